"""Driver for `ray job submit`: a study whose runs are spread over the cluster.

    ray job submit --working-dir . -- python ray_jobs/study.py --study S --ray --work-dir DIR

Without `--ray` the runs are processes of the driver's node.
"""

import driver

if __name__ == "__main__":
    driver.main("study")

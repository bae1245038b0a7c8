"""Driver for `ray job submit`: the pipeline up to `--until`.

    ray start --head ray job submit --working-dir . -- python ray_jobs/pipeline.py --recipe
    ml100k_demo --until shards

Without a running cluster the same command starts a local one.
"""

import driver

if __name__ == "__main__":
    driver.main("run")

"""Driver for `ray job submit`: the pipeline up to `--until`.

    ray job submit --working-dir . -- python ray_jobs/pipeline.py --recipe R --until shards

Without a running cluster the same command starts a local one.
"""

import driver

if __name__ == "__main__":
    driver.main("run")

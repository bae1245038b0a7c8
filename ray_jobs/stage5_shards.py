"""Driver for `ray job submit`: stage 5, shards, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage5_shards.py --recipe ml100k_demo --work-dir
DIR
"""

import driver

if __name__ == "__main__":
    driver.main("shards")

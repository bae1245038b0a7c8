"""Driver for `ray job submit`: stage 5, shards, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage5_shards.py --recipe R --work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("shards")

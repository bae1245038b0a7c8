"""Driver for `ray job submit`: stage 3, retrieval, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage3_retrieval.py --recipe R --work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("retrieval")

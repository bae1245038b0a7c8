"""Driver for `ray job submit`: stage 3, retrieval, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage3_retrieval.py --recipe ml100k_demo
--work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("retrieval")

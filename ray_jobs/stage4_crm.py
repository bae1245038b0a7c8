"""Driver for `ray job submit`: stage 4, crm, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage4_crm.py --recipe ml100k_demo --work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("crm")

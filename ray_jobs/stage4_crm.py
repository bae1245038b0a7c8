"""Driver for `ray job submit`: stage 4, crm, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage4_crm.py --recipe R --work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("crm")

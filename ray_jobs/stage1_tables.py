"""Driver for `ray job submit`: stage 1, tables, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage1_tables.py --recipe R --work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("tables")

"""Driver for `ray job submit`: stage 2, embeddings, on committed inputs.

ray job submit --working-dir . -- python ray_jobs/stage2_embeddings.py --recipe R --work-dir DIR
"""

import driver

if __name__ == "__main__":
    driver.main("embeddings")

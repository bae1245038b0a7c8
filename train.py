"""Stage 6 on every rank: `deepspeed --num_accelerators 2 train.py --recipe NAME_OR_PATH`.

The flags are those of `rellax train`; `--local_rank`, which some launchers add, is ignored because
the rank comes from the environment.
"""

import sys

from rellax_ds.cli import main

if __name__ == "__main__":
    flags = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    sys.argv[1:] = ["train", *flags]
    main()

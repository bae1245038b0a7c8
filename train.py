"""Stage 6 on every rank: `deepspeed --num_accelerators 2 train.py --recipe NAME_OR_PATH`.

The flags are those of `rellax train`. Where that command starts the recipe's number of ranks
itself, this script is one rank of whatever launcher started it, or the only one. `--local_rank`,
which some launchers add, is ignored because the rank comes from the environment.
"""

import sys

from rellax_ds.cli import main

ALONE = ("--set", "train.num_processes=1")  # a later --set of the user's still wins

if __name__ == "__main__":
    flags = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    sys.argv[1:] = ["train", *ALONE, *flags]
    main()

"""What every driver of this folder does: put the checkout on the path and call one `rellax`
subcommand.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rellax_ds import cli


def main(command: str) -> None:
    """Run `rellax COMMAND` with this process's own flags."""
    sys.argv.insert(1, command)
    cli.main()

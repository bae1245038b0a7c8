"""The reader of every data set by its name in the recipe: the one place that knows them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rellax_ds.tables import (
    bookcrossing,
    generic,
    movielens,
    movielens_1m,
    movielens_latest,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.config import DataConfig
    from rellax_ds.tables import RawLog

_OF_FOLDER = {
    "movielens-100k": movielens.read,
    "movielens-1m": movielens_1m.read,
    "movielens-25m": movielens_latest.read,
    "movielens-latest": movielens_latest.read,
}


def read_log(config: DataConfig, folder: Path) -> RawLog:
    """Read the log that the recipe names.

    Args:
        config: The recipe's data section.
        folder: Where the raw files lie; a generic log lies where the recipe says.

    Raises:
        TableError: The files are not as they should be; names file, place and value.
    """
    if config.dataset == "generic":
        return generic.read(config)
    if config.dataset == "bookcrossing":
        return bookcrossing.read(folder, drop_implicit=config.drop_implicit)
    return _OF_FOLDER[config.dataset](folder)

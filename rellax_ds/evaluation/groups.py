"""Groups of scored rows that a recommender may treat differently: by user, history and target.

An average hides who pays for it. Rows are grouped by what is known about them before they are
scored: whether training holds their user, how long the user's history is, and how often training
holds the target item.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rellax_ds.evaluation.baselines import Log

    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]

_TRAIN = 0
_HISTORY_EDGES = (20, 50, 100)
_POPULARITY_EDGES = (1, 10, 100)


class Group(NamedTuple):
    """Rows of one group; `by` says what rows are grouped by."""

    by: str
    name: str
    rows: IntArray


def groups_of(log: Log, user: IntArray, rows: IntArray) -> list[Group]:
    """The groups of some scored rows; those of one `by` hold every row once.

    Args:
        log: Events and samples.
        user: User of each sample, [S].
        rows: Sample ids, [N].
    """
    train = log.split == _TRAIN
    warm = np.isin(user[rows], user[train])
    length = log.history_end[rows] - log.history_start[rows]
    item_of = log.event_item[log.event]
    popularity = np.bincount(item_of[train], minlength=int(item_of.max()) + 1)[item_of[rows]]
    return [
        Group("user", "warm", rows[warm]),
        Group("user", "cold", rows[~warm]),
        *_between("history", length, _HISTORY_EDGES, rows),
        *_between("target", popularity, _POPULARITY_EDGES, rows),
    ]


def history_groups(lengths: IntArray) -> list[tuple[str, BoolArray]]:
    """The groups by history length alone: name, and which of the rows are in it.

    Args:
        lengths: Events in the user's history before each row's target, [N].
    """
    places = np.arange(lengths.size)
    groups = _between("history", lengths, _HISTORY_EDGES, places)
    return [(group.name, np.isin(places, group.rows)) for group in groups]


def _between(by: str, values: IntArray, edges: tuple[int, ...], rows: IntArray) -> list[Group]:
    place = np.searchsorted(edges, values, side="right")
    names = [f"below {edges[0]}" if edges[0] > 1 else "0"]
    names += [f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)]
    names.append(f"{edges[-1]} and more")
    return [Group(by, name, rows[place == number]) for number, name in enumerate(names)]

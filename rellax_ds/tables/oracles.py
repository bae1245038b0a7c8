"""Published counts of the official releases: what stage 1 must find when it is given their files.

A reader that drops one row still gives a plausible log, and every later number is then wrong in
silence. So a log that has a release's number of ratings and users is taken for that release, and
all other counts must agree. They hold under the published rules only; a recipe with other rules, or
another log, is not checked, and the stage says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rellax_ds import schema
from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rellax_ds.config import DataConfig
    from rellax_ds.tables import Tables


@dataclass(frozen=True)
class Release:
    """One official release.

    Attributes:
        title: Its name.
        known_by: Counts that identify it, by name.
        counts: Counts it must give, by name; see `count`.
    """

    title: str
    known_by: Mapping[str, int]
    counts: Mapping[str, int]


RELEASES: Mapping[str, tuple[Release, ...]] = {
    "movielens-100k": (
        Release(
            "MovieLens-100K",
            {"events": 100_000, "users": 943},
            {
                **{"items": 1_682, "rated_items": 1_682},
                **{"samples": 95_285, "train": 76_228, "valid": 9_528, "test": 9_529},
                **{"train_likes": 41_817, "valid_likes": 5_389, "test_likes": 5_354},
            },
        ),
    ),
    "movielens-1m": (
        Release(
            "MovieLens-1M",
            {"events": 1_000_209, "users": 6_040},
            {
                "rated_items": 3_706,
                **{"samples": 970_009, "train": 776_007, "valid": 97_000, "test": 97_002},
            },
        ),
    ),
    "movielens-25m": (
        Release(
            "MovieLens-25M",
            {"events": 25_000_095, "users": 162_541},
            {
                "rated_items": 59_047,
                "samples": 24_187_390,
                **{"train": 19_349_912, "valid": 2_418_739, "test": 2_418_739},
            },
        ),
    ),
    "movielens-latest": (
        Release(
            "MovieLens-latest-small of 2016-10",
            {"events": 100_004, "users": 671},
            {
                "rated_items": 9_066,
                **{"samples": 96_649, "train": 77_319, "valid": 9_664, "test": 9_666},
                **{"train_likes": 47_558, "valid_likes": 6_578, "test_likes": 6_011},
            },
        ),
    ),
    "bookcrossing": (
        Release(
            "BookCrossing",
            {"users": 278_858, "items": 271_375},
            {"samples": 17_714, "train_and_valid": 15_942, "test": 1_772},
        ),
    ),
}
"""Releases by `data.dataset`. BookCrossing's published training part includes our valid."""


def check(config: DataConfig, tables: Tables) -> str:
    """Compare the tables with the published counts of the release they come from.

    Returns:
        What came of it, in one clause: met, or why they were not compared.

    Raises:
        TableError: The files are a release's and a count differs.
    """
    releases = RELEASES.get(config.dataset, ())
    if not releases:
        return "none for this data set"
    found = count(tables)
    for release in releases:
        if any(found[name] != number for name, number in release.known_by.items()):
            continue
        if not follows_published_rules(config):
            return f"not compared, the recipe's rules are not those of {release.title}"
        for name, number in release.counts.items():
            if found[name] != number:
                known = " and ".join(f"{n} {key}" for key, n in release.known_by.items())
                what = name.replace("_", " ")
                raise TableError(
                    f"{release.title} (known by its {known}): {found[name]} {what}, published are "
                    f"{number}; get the official files again"
                )
        return f"met, {release.title}"
    seen = ", ".join(f"{found[name]} {name}" for name in ("events", "users", "items"))
    return f"not compared, {seen} are no known release"


def count(tables: Tables) -> dict[str, int]:
    """Rows, samples and likes by split, rated items, and train and valid together."""
    of_split = tables.samples.column("split").to_numpy()
    label = tables.samples.column("label").to_numpy()
    sizes = np.bincount(of_split, minlength=len(schema.SPLITS)).tolist()
    likes = np.bincount(of_split[label == 1], minlength=len(schema.SPLITS)).tolist()
    rated = np.bincount(tables.events.column("item").to_numpy(), minlength=tables.items.num_rows)
    return {
        "users": tables.users.num_rows,
        "items": tables.items.num_rows,
        "rated_items": int(np.count_nonzero(rated)),
        "events": tables.events.num_rows,
        "samples": tables.samples.num_rows,
        **dict(zip(schema.SPLITS, sizes, strict=True)),
        **{f"{name}_likes": n for name, n in zip(schema.SPLITS, likes, strict=True)},
        "train_and_valid": sizes[0] + sizes[1],
    }


def follows_published_rules(config: DataConfig) -> bool:
    """Whether the recipe labels, filters and splits as the published preprocessing does."""
    if config.min_history != 5:
        return False
    if config.dataset == "bookcrossing":
        by_user = (config.split_by, config.samples_per_user) == ("user", "last")
        tenth = abs(config.split[2] - 0.1) < 1e-9
        return by_user and tenth and not config.drop_implicit
    label = (config.label_threshold, config.label_inclusive) == (3.0, False)
    by_time = config.split_by == "time" and config.split == (0.8, 0.1, 0.1)
    return label and by_time and not config.strict_time

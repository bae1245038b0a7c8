"""Where a text may be cut without changing its ids, asked of the tokenizer itself.

Joined ids equal the ids of the joined text only where the tokenizer parts the two anyway. Many do
at every seam of our templates; some add a blank, swallow a line feed or merge across the seam. So
every seam is tried, with the items of the catalogue and with every other value, before a prompt is
written. A span in which one seam fails has none: its pieces are tokenised together, once for every
combination they show. (To join only the two pieces at the seam is not enough: a Unigram tokenizer
weighs whole words, and another seam in the same word may hold for all probes but one.)
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np

from rellax_ds import runtime
from rellax_ds.prompts.spans import NAMES, Cuts, Part, Unit, grouped, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rellax_ds.prompts.assemble import Ints
    from rellax_ds.prompts.spans import Name, Wording

Verdict = Literal["exact", "joined"]

MAX_ITEMS = 4096
"""Items tried at every seam; of a larger catalogue, evenly spaced ones."""

_MAX_PROFILES = 256
_MIN_PROBES = 256
_MAX_SPANS = 512
_RATINGS = (0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 10.0)
_INDICES = (1, 2, 9, 10, 11, 30, 100)


def find_cuts(
    parts: Mapping[Name, Sequence[Part]], make: Callable[..., Unit], wording: Wording, starts: bool
) -> Cuts:
    """The seams of every kind of span at which its text may be cut: all of them or none.

    Args:
        parts: Parts of every kind.
        make: Makes a unit from parts, the text before it and whether a prompt begins with it.
        wording: Numbers to text.
        starts: Whether the content begins the text of a prompt.
    """
    values = _probes(wording)
    cuts = whole(parts, cut=True)
    bare = whole(parts, cut=False)
    for name in NAMES:
        start = starts_span(name, starts)
        few = {column: numbers[:_MAX_SPANS] for column, numbers in values.items()}
        seams = [n for n, cut in enumerate(bare[name]) if not cut]
        if not (
            all(_parted(parts[name], n, make, values, start) for n in seams)
            and _spans_equal(parts[name], make, few, start)
        ):
            cuts[name] = bare[name]
    return cuts


def verdict(parts: Mapping[Name, Sequence[Part]], cuts: Cuts) -> Verdict:
    """`exact` if every piece is tokenised on its own, `joined` if some are taken together."""
    return "exact" if cuts == whole(parts, cut=True) else "joined"


def report(parts: Mapping[Name, Sequence[Part]], cuts: Cuts, tokenizer: str) -> None:
    """Say so where pieces are not tokenised one by one."""
    if verdict(parts, cuts) == "exact":
        return
    everywhere = whole(parts, cut=True)
    lost = sum(sum(everywhere[name]) - sum(cuts[name]) for name in NAMES)
    total = sum(len(everywhere[name]) for name in NAMES)
    runtime.logger.info(
        "shards: tokenizer %s joins %d of %d seams between template pieces; these are tokenised"
        " together",
        tokenizer,
        lost,
        total,
    )


def units_of(
    parts: Sequence[Part], cuts: Sequence[bool], make: Callable[..., Unit], start: bool
) -> list[Unit]:
    """The units of a span; `start` if a prompt begins with it and no control token precedes."""
    made = []
    for first, run in grouped(parts, cuts):
        previous = parts[first - 1] if first else None
        begins = start and (previous is None or not _speaks(parts[:first]))
        before = "" if previous is None or begins else previous.example
        made.append(make(run, before, begins))
    return made


def starts_span(name: Name, starts: bool) -> bool:
    """Whether a prompt's text begins with this kind of span."""
    return starts and name in ("open", "bare")


def _speaks(parts: Sequence[Part]) -> bool:
    return any(part.kind != "control" for part in parts)


def _parted(
    parts: Sequence[Part], n: int, make: Callable[..., Unit], values: dict[str, Ints], start: bool
) -> bool:
    """Whether parts n and n + 1 have the ids of their joined text, for all probes."""
    alone = [False] * (len(parts) - 1)
    alone[n] = True
    if n:
        alone[n - 1] = True
    if n + 2 < len(parts):
        alone[n + 1] = True
    joined = list(alone)
    joined[n] = False
    apart = units_of(parts, alone, make, start)
    together = units_of(parts, joined, make, start)
    first = sum(alone[:n])
    left, right = (_encode(unit, values) for unit in apart[first : first + 2])
    return all(
        whole_ids == a + b
        for whole_ids, a, b in zip(_encode(together[first], values), left, right, strict=True)
    )


def _spans_equal(
    parts: Sequence[Part], make: Callable[..., Unit], values: dict[str, Ints], start: bool
) -> bool:
    """Whether a span cut at all its seams has the ids of its whole text, for some probes."""
    bare = ["control" in (a.kind, b.kind) for a, b in itertools.pairwise(parts)]
    found: list[list[list[int]]] = []
    for cuts in ([True] * len(bare), bare):
        columns = [_encode(unit, values) for unit in units_of(parts, cuts, make, start)]
        rows = zip(*columns, strict=True)
        found.append([list(itertools.chain.from_iterable(row)) for row in rows])
    same: bool = found[0] == found[1]
    return same


def _encode(unit: Unit, values: dict[str, Ints]) -> list[list[int]]:
    """Ids of a unit for every probe; what reads the same is tokenised once."""
    size = len(next(iter(values.values())))
    keys = [values[name] for name in unit.columns]
    if not keys:
        return unit.encode(np.zeros((1, 1), np.int64)) * size
    unique, inverse = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
    ids = unit.encode(unique)
    return [ids[n] for n in inverse.reshape(-1).tolist()]


def _probes(wording: Wording) -> dict[str, Ints]:
    """Numbers of every column, all of the same length: every item tried once or more, with every
    other value drawn for it.
    """
    draw = np.random.default_rng(0)
    count = min(wording.num_items, MAX_ITEMS)
    items = np.linspace(0, wording.num_items - 1, count).astype(np.int64)
    users = np.unique(np.linspace(0, max(wording.num_users - 1, 0), _MAX_PROFILES).astype(np.int64))
    profiles = np.unique([0, *wording.profile_numbers(users)])
    size = max(count, _MIN_PROBES)
    values = {"profile": np.resize(profiles, size)}
    others = {
        "item": items,
        "rating": wording.rating_numbers(np.array(_RATINGS, np.float32)),
        "index": np.array(_INDICES, np.int64),
        "label": np.array([0, 1], np.int64),
    }
    for column, numbers in others.items():
        values[column] = draw.choice(numbers, size)
        values[f"before_{column}"] = draw.choice(numbers, size)
    values["item"] = np.resize(items, size)
    values["before_item"] = np.resize(np.roll(items, 1), size)
    return values

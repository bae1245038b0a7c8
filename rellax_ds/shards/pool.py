"""Which samples become prompts, and which behaviour each prompt shows.

A pool is all samples of a split, ordered by a keyed hash of the sample id; N shots are its first N,
so a smaller run trains on a subset of a larger one's rows and no library's random stream decides.
Histories are read by row number from the columnar tables, for all samples of a shard at once, and
never reach past a sample's own range of events.

Five patterns of behaviour are known: `recent`, the last K events; `retrieved`, the K most similar
to the target in order of time; `high` and `low`, the same K by falling and by rising similarity;
and rows of recent and retrieved in turn (`mixed`, or `half_mixed` with half as many shots).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax_ds import runtime, schema
from rellax_ds.errors import ArtifactError, ConfigError, TableError
from rellax_ds.prompts.assemble import offsets_of, ragged
from rellax_ds.shards.order import mix64

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from rellax_ds.config import ShardsConfig

Variant = Literal["recent", "retrieved", "high", "low"]
VARIANTS: tuple[Variant, ...] = ("recent", "retrieved", "high", "low")
MIXED = ("mixed", "half_mixed")
"""Patterns of training rows in which a shot is written twice."""

Row = tuple[int, Variant]
"""A prompt to write: sample id and the kind of history it shows."""


def pool_order(samples: npt.NDArray[np.int64], seed: int, split: str) -> npt.NDArray[np.int64]:
    """The sample ids in the order of the seeded pool: sorted by a keyed hash of the id."""
    key = np.uint64(runtime.stable_seed("pool", split, seed))
    hashed = mix64(mix64(samples.astype(np.uint64) ^ key) + key)
    return samples[np.lexsort((samples, hashed))]


def choose_rows(
    split_of: npt.NDArray[np.int8],
    config: ShardsConfig,
    seed: int,
    holdout_start: int | None,
    folds: npt.NDArray[np.int8] | None = None,
) -> dict[str, list[Row]]:
    """The prompts of every split, in the order they are written.

    Train keeps the pool's order (so fewer shots are a prefix of more); valid and test are sorted by
    sample id. With `mixed` history a shot gives two prompts, recent then retrieved, and with
    `half_mixed` half as many shots give as many prompts as are asked for; valid and test then show
    retrieved history.

    Args:
        split_of: Column `split` of the samples, int8 [num_samples].
        config: The recipe's shards section.
        seed: The recipe's seed.
        holdout_start: First sample of the training tail the recommender has not seen.
        folds: Fold of every sample, where the recommender has folds.

    Raises:
        ConfigError: A split has fewer samples than asked for.
    """
    rows: dict[str, list[Row]] = {}
    for number, split in enumerate(schema.SPLITS):
        samples = np.flatnonzero(split_of == number).astype(np.int64)
        if split == "train":
            samples = training_candidates(split_of, config, holdout_start, folds)
        wanted = getattr(config, f"{split}_rows")
        if split == "train" and config.history == "half_mixed" and wanted % 2:
            raise ConfigError(
                f"shards.train_rows is {wanted}, but half_mixed history writes every shot twice;"
                " ask for an even number"
            )
        if wanted is not None and wanted > len(samples):
            raise ConfigError(
                f"shards.{split}_rows is {wanted}, but only {len(samples)} samples can be drawn;"
                " ask for fewer"
            )
        chosen = pool_order(samples, seed, split)[:wanted]
        mixed = split == "train" and config.history in MIXED
        if mixed and config.history == "half_mixed":
            chosen = chosen[: len(chosen) // 2]
        if split != "train":
            chosen = np.sort(chosen)
        shown: Variant = next((kind for kind in VARIANTS if kind == config.history), "retrieved")
        variants: tuple[Variant, ...] = ("recent", "retrieved") if mixed else (shown,)
        rows[split] = [(sample, variant) for sample in chosen.tolist() for variant in variants]
    return rows


def training_candidates(
    split_of: npt.NDArray[np.int8],
    config: ShardsConfig,
    holdout_start: int | None,
    folds: npt.NDArray[np.int8] | None = None,
) -> npt.NDArray[np.int64]:
    """Ids of the training samples that shots are drawn from.

    Where the recommender has folds, samples without one (which it was trained on) are left out.

    Raises:
        ConfigError: The holdout is asked for and the recommender was trained without one.
    """
    samples = np.flatnonzero(split_of == schema.SPLITS.index("train")).astype(np.int64)
    if folds is not None:
        samples = samples[folds[samples] >= 0]
    if config.train_from == "all":
        return samples
    if holdout_start is None:
        raise ConfigError(
            "shards.train_from is 'holdout', but the recommender was trained without one;"
            " set crm.holdout above 0"
        )
    return samples[samples >= holdout_start]


def read_splits(tables: Path) -> npt.NDArray[np.int8]:
    """Column `split` of the samples, int8 [num_samples].

    Raises:
        TableError: The table is absent or lacks the column.
    """
    path = tables / "samples.parquet"
    kinds = {"split": schema.SAMPLES["split"]}
    try:
        table = pq.read_table(path, columns=list(kinds))
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(f"{path}: cannot be read ({error}); run `rellax tables` again") from None
    column: npt.NDArray[np.int8] = schema.check_table(table, kinds, str(path))["split"].to_numpy()
    return column


def read_holdout_start(crm: Path) -> int | None:
    """First sample of the recommender's held-out tail, from its metrics.

    Raises:
        ArtifactError: The metrics are absent or lack the entry.
    """
    path = crm / "metrics.json"
    try:
        start = json.loads(path.read_text(encoding="utf-8"))["holdout_start"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path}: 'holdout_start' cannot be read ({error}); run `rellax crm` again"
        ) from None
    return None if start is None else int(start)


def read_folds(crm: Path) -> npt.NDArray[np.int8] | None:
    """Fold of every sample, int8 [num_samples], or None where the recommender has none."""
    path = crm / "folds.npy"
    return np.load(path, allow_pickle=False) if path.exists() else None


@dataclass(frozen=True)
class Behaviours:
    """The events that N prompts may show, in the order shown.

    Attributes:
        offsets: int64 [N + 1]; prompt n shows `offsets[n]:offsets[n + 1]`.
        events: Event rows [M].
        drop_rank: Of a prompt's events, 0 for the first to be given up [M].
    """

    offsets: npt.NDArray[np.int64]
    events: npt.NDArray[np.int64]
    drop_rank: npt.NDArray[np.int64]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Events of every prompt [N]."""
        return np.diff(self.offsets)


def recent_histories(
    starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64], length: int
) -> Behaviours:
    """The last `length` events of every range `start:stop`; the oldest is given up first."""
    first = np.maximum(starts, stops - length)
    sizes = stops - first
    rank = ragged(np.zeros_like(first), sizes)
    return Behaviours(offsets_of(sizes), ragged(first, sizes), rank)


def retrieved_histories(
    offsets: npt.NDArray[np.int64],
    events: npt.NDArray[np.int64],
    similarity: npt.NDArray[np.float32],
    length: int,
    order: Variant = "retrieved",
) -> Behaviours:
    """The `length` most similar events of every prompt; the least similar is given up first.

    Among equals the later event counts as more similar, as in retrieval.

    Args:
        offsets: Prompt n has retrieved `offsets[n]:offsets[n + 1]` [N + 1].
        events: Event rows [M].
        similarity: Similarity to the target [M].
        length: K.
        order: `retrieved` shows them in order of time, `high` the most similar first, `low` last.
    """
    sizes = np.diff(offsets)
    prompt_of = np.repeat(np.arange(len(sizes)), sizes)
    by_similarity = np.lexsort((events, similarity, prompt_of))
    rank = ragged(np.minimum(length - sizes, 0), sizes)  # from the least similar, 0 for the K-th
    chosen, rank = by_similarity[rank >= 0], rank[rank >= 0]
    kept = np.minimum(sizes, length)
    prompt_of = prompt_of[chosen]
    shown = {"retrieved": events[chosen], "high": -rank, "low": rank}[order]
    in_order = np.lexsort((shown, prompt_of))
    return Behaviours(offsets_of(kept), events[chosen][in_order], rank[in_order])


def interleave(parts: Sequence[tuple[npt.NDArray[np.int64], Behaviours]]) -> Behaviours:
    """Histories of several patterns as those of one list of prompts.

    Args:
        parts: Places in the list, and the histories that go there.
    """
    count = sum(len(places) for places, _ in parts)
    sizes = np.zeros(count, np.int64)
    for places, found in parts:
        sizes[places] = found.sizes
    offsets = offsets_of(sizes)
    events, rank = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
    for places, found in parts:
        where = ragged(offsets[places], found.sizes)
        events[where], rank[where] = found.events, found.drop_rank
    return Behaviours(offsets, events, rank)


def check_histories(
    offsets: npt.NDArray[np.int64],
    events: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    samples: npt.NDArray[np.int64],
) -> None:
    """Refuse a history that reaches outside its sample's own range of events.

    Args:
        offsets: Sample n has events `offsets[n]:offsets[n + 1]`, in order of time [N + 1].
        events: Event rows [M].
        starts: First event of every sample's history [N].
        stops: End of it [N].
        samples: Sample ids, for the message [N].

    Raises:
        TableError: An event lies outside its range: it would tell of the future or of another
            user; or one occurs twice.
    """
    sizes = np.diff(offsets)
    wrong = (events < np.repeat(starts, sizes)) | (events >= np.repeat(stops, sizes))
    follows = np.ones(len(events), bool)
    follows[offsets[:-1][sizes > 0]] = False
    wrong[1:] |= follows[1:] & (np.diff(events) < 1)
    if wrong.any():
        n = int(np.searchsorted(offsets, np.flatnonzero(wrong)[0], side="right")) - 1
        found = events[offsets[n] : offsets[n + 1]].tolist()
        raise TableError(
            f"sample {samples[n]}: its retrieved events {found} are not ascending rows of its"
            f" history {starts[n]}:{stops[n]}; run `rellax retrieval` again"
        )


def take_rows(path: Path, columns: Sequence[str], rows: npt.NDArray[np.int64]) -> pa.Table:
    """Rows of a Parquet file by row number, reading only the row groups that hold them.

    Args:
        path: A table whose row number is its id.
        columns: Columns wanted.
        rows: Row numbers in any order [N].

    Returns:
        N rows, in the order of `rows`.

    Raises:
        TableError: The file is absent or shorter than the largest row number.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TableError(
            f"{path}: cannot be read ({error}); rerun the stage that writes it"
        ) from None
    with file:
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        starts = np.cumsum([0, *sizes])
        if len(rows) and rows.max() >= starts[-1]:
            raise TableError(
                f"{path}: has {starts[-1]} rows, row {rows.max()} is asked for;"
                " rerun the stage that writes it"
            )
        group_of = np.searchsorted(starts, rows, side="right") - 1
        groups = np.unique(group_of)
        table = file.read_row_groups(groups.tolist(), columns=list(columns))
    local = np.cumsum([0, *(sizes[group] for group in groups)])[np.searchsorted(groups, group_of)]
    return table.take(pa.array(local + rows - starts[group_of]))

"""Which samples become prompts, and which behaviour each prompt shows.

A pool is all samples of a split, ordered by a keyed hash of the sample id; N shots are its first N,
so a smaller run trains on a subset of a larger one's rows and no library's random stream decides.
Histories are read by row number from the columnar tables, and never reach past a sample's own
range of events.
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
from rellax_ds.shards.order import mix64

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from rellax_ds.config import ShardsConfig

Variant = Literal["recent", "retrieved"]
Row = tuple[int, Variant]
"""A prompt to write: sample id and the kind of history it shows."""


def pool_order(samples: npt.NDArray[np.int64], seed: int, split: str) -> npt.NDArray[np.int64]:
    """The sample ids in the order of the seeded pool: sorted by a keyed hash of the id."""
    key = np.uint64(runtime.stable_seed("pool", split, seed))
    hashed = mix64(mix64(samples.astype(np.uint64) ^ key) + key)
    return samples[np.lexsort((samples, hashed))]


def choose_rows(
    split_of: npt.NDArray[np.int8], config: ShardsConfig, seed: int, holdout_start: int | None
) -> dict[str, list[Row]]:
    """The prompts of every split, in the order they are written.

    Train keeps the pool's order (so fewer shots are a prefix of more); valid and test are sorted by
    sample id. With `mixed` history a shot gives two prompts, recent then retrieved; valid and test
    show retrieved history.

    Args:
        split_of: Column `split` of the samples, int8 [num_samples].
        config: The recipe's shards section.
        seed: The recipe's seed.
        holdout_start: First sample of the training tail the recommender has not seen.

    Raises:
        ConfigError: A split has fewer samples than asked for.
    """
    rows: dict[str, list[Row]] = {}
    for number, split in enumerate(schema.SPLITS):
        samples = np.flatnonzero(split_of == number).astype(np.int64)
        if split == "train" and config.train_from == "holdout":
            samples = training_candidates(split_of, config, holdout_start)
        wanted = getattr(config, f"{split}_rows")
        if wanted is not None and wanted > len(samples):
            raise ConfigError(
                f"shards.{split}_rows is {wanted}, but only {len(samples)} samples can be drawn;"
                " ask for fewer"
            )
        chosen = pool_order(samples, seed, split)[:wanted]
        if split != "train":
            chosen = np.sort(chosen)
        variants: tuple[Variant, ...] = (
            ("recent",) if config.history == "recent" else ("retrieved",)
        )
        if split == "train" and config.history == "mixed":
            variants = ("recent", "retrieved")
        rows[split] = [(sample, variant) for sample in chosen.tolist() for variant in variants]
    return rows


def training_candidates(
    split_of: npt.NDArray[np.int8], config: ShardsConfig, holdout_start: int | None
) -> npt.NDArray[np.int64]:
    """Ids of the training samples that shots are drawn from.

    Raises:
        ConfigError: The holdout is asked for and the recommender was trained without one.
    """
    samples = np.flatnonzero(split_of == schema.SPLITS.index("train")).astype(np.int64)
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


@dataclass(frozen=True)
class Behaviour:
    """The events one prompt may show, oldest first.

    Attributes:
        events: Event rows [K].
        drop_order: Positions 0..K-1, the first to be given up first.
    """

    events: npt.NDArray[np.int64]
    drop_order: npt.NDArray[np.int64]


def recent_history(start: int, stop: int, length: int) -> Behaviour:
    """The last `length` events of the range `start:stop`; the oldest is given up first."""
    events = np.arange(max(start, stop - length), stop, dtype=np.int64)
    return Behaviour(events, np.arange(len(events)))


def retrieved_history(
    events: npt.NDArray[np.int64], similarity: npt.NDArray[np.float32], length: int
) -> Behaviour:
    """The `length` most similar events in chronological order; the least similar goes first.

    Among equals the later event counts as more similar, as in retrieval.
    """
    ascending = np.lexsort((events, similarity))[-length:]
    kept = np.sort(ascending)
    rank = np.empty(len(events), np.int64)
    rank[ascending] = np.arange(len(ascending))
    return Behaviour(events[kept], np.argsort(rank[kept]))


def check_history(behaviour: Behaviour, start: int, stop: int, sample: int) -> None:
    """Refuse a history that reaches outside the sample's own range of events.

    Raises:
        TableError: An event lies outside `start:stop`: it would tell of the future or of another
            user.
    """
    events = behaviour.events
    if len(events) and (
        events.min() < start or events.max() >= stop or (np.diff(events) < 1).any()
    ):
        raise TableError(
            f"sample {sample}: its retrieved events {events.tolist()} are not ascending rows of"
            f" its history {start}:{stop}; run `rellax retrieval` again"
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

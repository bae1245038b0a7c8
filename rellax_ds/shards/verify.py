"""The whole of a set of shards against its index: what `rellax shards verify` runs.

A reader checks what it opens. This checks everything: every file that the index names and no
other, every sha256, and that reading every tar from its first byte to its last gives exactly the
samples, places and checksums that the columns state. Every truncation and every changed bit of any
file is an error, because each file is covered by a sha256 and the index by its own digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import schema
from rellax_ds.errors import ShardError
from rellax_ds.shards.read import INDEX, REMEDY, ShardIndex, ShardReader, check_file, scan_shard

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Verified:
    """What was found of one split, all of it in order.

    Attributes:
        split: `train`, `valid` or `test`.
        shards: Number of shards.
        samples: Number of prompts.
        tokens: Tokens of all prompts.
        bytes: Bytes of all shards.
    """

    split: str
    shards: int
    samples: int
    tokens: int
    bytes: int


def verify_shards(folder: Path, stated: dict[str, Any] | None = None) -> list[Verified]:
    """Check every byte of a set of shards.

    Args:
        folder: Folder of stage 5.
        stated: Files of the artefact's manifest (name to `bytes` and `sha256`), if it was
            committed: the index must be the one it was committed with.

    Returns:
        One entry a split, in order.

    Raises:
        ShardError: A file is absent, extra, truncated or altered, or the index states other
            samples than the shards hold; names the file and the place.
    """
    index = ShardIndex.open(folder)
    if stated is not None:
        check_file(folder / INDEX, stated[INDEX])
    named = {shard["name"] for shards in index.document["shards"].values() for shard in shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in named:
            raise ShardError(f"{path}: the index names no such shard; {REMEDY}")
    if index.item_table.shape[1] != index.item_width:
        raise ShardError(f"{folder}: item table of another width than the index says; {REMEDY}")
    return [_verify_split(index, split) for split in schema.SPLITS]


def _verify_split(index: ShardIndex, split: str) -> Verified:
    reader = ShardReader(index, split, "sha256")
    rows, shards = index.rows(split), index.document["shards"][split]
    places = np.stack([rows.column(name).to_numpy() for name in ("offset", "length", "crc32")], 1)
    first = 0
    for shard in shards:
        found = scan_shard(index.folder / shard["name"])
        stop = first + shard["n"]
        same = [sample.key for sample in found] == [reader.key(n) for n in range(first, stop)]
        if not same or not np.array_equal(
            np.array([sample[1:] for sample in found], np.int64).reshape(-1, 3), places[first:stop]
        ):
            raise ShardError(
                f"{index.folder / shard['name']}: holds other samples than the index says; {REMEDY}"
            )
        first = stop
    if index.document["splits"][split]["rows"] != first:
        raise ShardError(
            f"{index.folder}: {first} samples of {split}, but the index counts"
            f" {index.document['splits'][split]['rows']}; {REMEDY}"
        )
    return Verified(
        split,
        len(shards),
        len(reader),
        int(reader.lengths.sum()),
        sum(int(shard["bytes"]) for shard in shards),
    )

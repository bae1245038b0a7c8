"""The index of a set of shards: written last, from what was read back from every closed tar.

A worker reads its tar back and writes a row a sample beside it; the driver joins these columns, in
the order of splits and shards, into `samples.parquet`. `index.json` then names every file with its
sha256, so it stays small however many samples there are, and its own digest covers them all.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rellax_ds import schema
from rellax_ds.artifacts import file_sha256, set_aside, write_json
from rellax_ds.config import digest
from rellax_ds.errors import ArtifactError
from rellax_ds.shards.read import (
    CRM,
    FORMAT,
    INDEX,
    SAMPLE_COLUMNS,
    SAMPLES,
    sample_key,
    scan_shard,
)
from rellax_ds.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rellax_ds.partitions import PartitionRecord

_PART = ".samples.parquet"


def write_columns(path: Path, columns: Mapping[str, Any], mixed: bool) -> None:
    """Read a closed shard back and write its rows of `samples.parquet` beside it.

    Args:
        path: `PARTITION.tar`.
        columns: `sample`, `variant`, `tokens` and `label` of its prompts, in order [N].
        mixed: Whether the keys name the variant.

    Raises:
        ArtifactError: The file does not hold these samples.
    """
    found = scan_shard(path)
    pairs = zip(columns["sample"], columns["variant"], strict=True)
    if [sample.key for sample in found] != [sample_key(int(n), int(v), mixed) for n, v in pairs]:
        raise ArtifactError(f"{path}: does not read back as it was written; check the disk")
    places = {name: [getattr(s, name) for s in found] for name in ("offset", "length", "crc32")}
    table = {**columns, **places}
    part = pa.table({name: pa.array(table[name], kind) for name, kind in SAMPLE_COLUMNS.items()})
    write_parquet(part, path.with_name(f"{path.stem}{_PART}"))


def write_index(
    folder: Path, records: Sequence[PartitionRecord], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the partitions' columns into `samples.parquet` and write `index.json`.

    Args:
        folder: Folder that holds the shards and `crm.safetensors`.
        records: Committed partitions, in order; their own columns are left out of the artefact.
        facts: Answer ids, template, tokenizer, widths and whether the data is `mixed`.

    Returns:
        The document, with its digest.
    """
    parts = {record.name: folder / f"{record.name}{_PART}" for record in records}
    tables = {name: read_parquet(path, SAMPLE_COLUMNS) for name, path in parts.items()}
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in schema.SPLITS}
    for record in records:
        name = f"{record.name}.tar"
        entry = {"name": name, **record.files[name], "n": record.counts["n"]}
        shards[record.counts["split"]].append(entry)
    empty = pa.schema(list(SAMPLE_COLUMNS.items())).empty_table()
    in_order = [
        record for split in schema.SPLITS for record in records if record.counts["split"] == split
    ]
    merged = pa.concat_tables([empty, *(tables[record.name] for record in in_order)])
    write_parquet(merged, folder / SAMPLES)
    document = {
        "format": FORMAT,
        **facts,
        "crm": _file_facts(folder / CRM),
        "samples": _file_facts(folder / SAMPLES),
        "splits": {split: _statistics(records, tables, split) for split in schema.SPLITS},
        "shards": shards,
    }
    document["digest"] = digest(document)
    write_json(folder / INDEX, document)
    set_aside(folder, [path.name for path in parts.values()])
    return document


def _statistics(
    records: Sequence[PartitionRecord], tables: Mapping[str, pa.Table], split: str
) -> dict[str, Any]:
    found = [record for record in records if record.counts["split"] == split]
    tokens, labels = (
        np.concatenate(
            [np.zeros(0), *(tables[record.name].column(name).to_numpy() for record in found)]
        )
        for name in ("tokens", "label")
    )
    dropped: collections.Counter[int] = collections.Counter()
    for record in found:
        dropped.update({int(n): count for n, count in record.counts["dropped"].items()})
    return {
        "rows": len(tokens),
        "shards": len(found),
        "tokens_mean": round(float(tokens.mean()), 3) if len(tokens) else 0.0,
        "tokens_max": int(tokens.max(initial=0)),
        "label_mean": round(float(labels.mean()), 6) if len(labels) else 0.0,
        "dropped": {str(count): dropped[count] for count in sorted(dropped)},
        "clipped": int(sum(record.counts["clipped"] for record in found)),
    }


def _file_facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

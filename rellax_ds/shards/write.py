"""Writing shards: one partition, one tar, equal input giving equal bytes.

A worker turns a list of (sample, variant) rows into prompts and writes them through webdataset's
tar codec with a fixed time stamp, then reads the closed file back: the offsets in the index are
those found in the file, and a file that does not read back is never committed. The driver writes
the recommender's part once (`crm.safetensors`: the standardised item table and the scale of h) and
merges the partitions' columns into `index.json`.
"""

from __future__ import annotations

import collections
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rellax_ds import schema
from rellax_ds.artifacts import file_sha256, write_json
from rellax_ds.config import digest
from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.prompts.render import History, Prompt, PromptBuilder
from rellax_ds.prompts.templates import Template
from rellax_ds.prompts.tokens import load_tokens
from rellax_ds.shards import pool
from rellax_ds.shards.read import CRM, FORMAT, INDEX, scan_shard
from rellax_ds.tables import read_parquet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from rellax_ds.partitions import Partition, PartitionRecord
    from rellax_ds.shards.pool import Row

_FLOOR = 0.25
_COLUMNS = ("keys", "offsets", "lengths", "crc32", "tokens", "labels")


class ShardWorker:
    """Writes the tar of one partition; payload `{"split": name, "rows": [[sample, variant], ...]}`.

    Built from JSON-like settings, so an actor can make it anywhere the folders are visible.
    """

    def __init__(
        self,
        *,
        tables: str,
        crm: str,
        retrieval: str | None,
        scale: str,
        tokenizer: str,
        template: dict[str, str],
        chat: bool,
        soft_slots: bool,
        history_length: int,
        max_tokens: int,
        label_threshold: float,
        suffix_variant: bool,
    ) -> None:
        """Read what every prompt needs.

        Args:
            tables: Folder of stage 1.
            crm: Folder of stage 4.
            retrieval: Folder of stage 3, if retrieved history is shown.
            scale: The `crm.safetensors` of the artefact being written.
            tokenizer: Local path or Hugging Face name.
            template: `Template.document()`.
            chat: Wrap prompts in the tokenizer's chat template.
            soft_slots: Place soft tokens.
            history_length: K, events a prompt shows at most.
            max_tokens: Longest prompt.
            label_threshold: A rating above this is a like; for the wording.
            suffix_variant: Name the variant in the key, because a sample is written twice.
        """
        from safetensors.numpy import load_file

        self._tables, self._crm = Path(tables), Path(crm)
        self._retrieval = None if retrieval is None else Path(retrieval)
        self._length, self._suffix_variant = history_length, suffix_variant
        self._items, self._ratings, self._labels = _read_events(self._tables)
        max_rating = float(self._ratings.max(initial=0.0))
        self.builder = PromptBuilder(
            Template(**template),
            load_tokens(tokenizer),
            _text_columns(self._tables / "items.parquet", schema.ITEMS),
            _text_columns(self._tables / "users.parquet", schema.USERS),
            {"like_rule": f"above {label_threshold:g}", "max_rating": f"{max_rating:g}"},
            chat=chat,
            soft_slots=soft_slots,
            max_tokens=max_tokens,
        )
        scales = load_file(scale)
        self._mean, self._std = scales["instance_mean"], scales["instance_std"]
        self._seen = scales["item_table"].any(axis=1)
        self._instances = np.load(self._crm / "instances.npy", mmap_mode="r", allow_pickle=False)

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Write `PARTITION.tar` and return the shard's columns of the index."""
        import webdataset

        rows: list[Row] = [(int(sample), kind) for sample, kind in partition.payload["rows"]]
        split = str(partition.payload["split"])
        samples = self._samples(rows)
        path = directory / f"{partition.name}.tar"
        counts: dict[str, Any] = {"tokens": [], "labels": [], "dropped": [], "clipped": 0}
        with (
            path.open("wb") as file,
            webdataset.TarWriter(file, mtime=0, encoder=False) as writer,
        ):
            for row, sample in zip(rows, samples, strict=True):
                prompt, facts = self._prompt(row, sample, split)
                writer.write(self._encode(row, prompt, facts))
                counts["tokens"].append(len(prompt.input_ids))
                counts["labels"].append(facts["label"])
                counts["dropped"].append(facts["dropped"])
                counts["clipped"] += prompt.clipped > 0
        found = scan_shard(path)
        if found["keys"] != [self._key(row) for row in rows]:
            raise ArtifactError(f"{path}: does not read back as it was written; check the disk")
        return {"split": split, "n": len(rows), **found, **counts}

    def _samples(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        ids = np.array([sample for sample, _ in rows], np.int64)
        table = pool.take_rows(self._tables / "samples.parquet", list(schema.SAMPLES), ids)
        found: list[dict[str, Any]] = table.to_pylist()
        wanted = [n for n, (_, kind) in enumerate(rows) if kind == "retrieved"]
        if wanted:
            if self._retrieval is None:
                raise ArtifactError("retrieved history needs stage 'retrieval'; run it first")
            path = self._retrieval / "retrieved.parquet"
            lists = pool.take_rows(path, list(schema.RETRIEVED), ids[wanted]).to_pylist()
            for n, entry in zip(wanted, lists, strict=True):
                if entry["sample"] != rows[n][0]:
                    raise TableError(
                        f"{path}: row {rows[n][0]} is of sample {entry['sample']};"
                        " run `rellax retrieval` again"
                    )
                found[n] |= {"events": entry["events"], "similarity": entry["similarity"]}
        return found

    def _prompt(
        self, row: Row, sample: dict[str, Any], split: str
    ) -> tuple[Prompt, dict[str, Any]]:
        sample_id, variant = row
        start, stop = sample["history_start"], sample["history_end"]
        if variant == "recent":
            behaviour = pool.recent_history(start, stop, self._length)
        else:
            behaviour = pool.retrieved_history(
                np.array(sample["events"], np.int64),
                np.array(sample["similarity"], np.float32),
                self._length,
            )
        pool.check_history(behaviour, start, stop, sample_id)
        events = behaviour.events
        history = History(
            self._items[events],
            self._ratings[events],
            self._labels[events],
            behaviour.drop_order.tolist(),
        )
        prompt = self.builder.build(sample["user"], sample["item"], sample["label"], history)
        facts = {name: sample[name] for name in ("user", "item", "label")}
        facts |= {"sample": sample_id, "split": split, "variant": variant}
        facts["history"] = events[list(prompt.kept)].tolist()
        facts["dropped"] = len(events) - len(prompt.kept)
        return prompt, facts

    def _encode(self, row: Row, prompt: Prompt, facts: dict[str, Any]) -> dict[str, Any]:
        slots = prompt.slot_items
        item_rows = np.where(slots >= 0, np.where(self._seen[slots + 1], slots + 1, 0), -1)
        tokens = np.stack([prompt.input_ids, item_rows, prompt.answers]).astype(np.int32)
        instance = (self._instances[row[0]].astype(np.float32) - self._mean) / self._std
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return {
            "__key__": self._key(row),
            "tokens.npy": _npy(tokens),
            "instance.npy": _npy(instance.astype(np.float32)),
            "sample.json": text.encode(),
        }

    def _key(self, row: Row) -> str:
        return f"{row[0]:012d}" + (f"-{row[1]}" if self._suffix_variant else "")


def write_scale(crm: Path, path: Path, rows: npt.NDArray[np.int64]) -> dict[str, int]:
    """Write `crm.safetensors`: what brings the recommender's outputs to unit scale.

    Item embeddings are standardised per column over the items the recommender has seen; row 0 and
    unseen items stay zero, which is the mean of the seen ones. The instance embedding's mean and
    deviation are taken over training rows. A deviation counts as at least a quarter of the mean
    one, so that a unit that is dead in training does not explode when it fires once.

    Args:
        crm: Folder of stage 4.
        path: File to write.
        rows: Sample ids over which h is measured.

    Returns:
        `item_width` and `instance_width`.

    Raises:
        ArtifactError: An array is absent, of the wrong form or not finite.
    """
    from safetensors.numpy import save_file

    table = _load_matrix(crm / "item_table.npy")
    instances = _load_matrix(crm / "instances.npy")
    seen = table.any(axis=1)
    item_mean, item_std = _moments(table[seen])
    standard = np.zeros(table.shape, np.float32)
    standard[seen] = (table[seen] - item_mean) / item_std
    mean, std = _moments(instances[np.sort(rows)])
    if not (np.isfinite(standard).all() and np.isfinite(mean).all() and np.isfinite(std).all()):
        raise ArtifactError(f"{crm}: the recommender's outputs are not finite; run `rellax crm`")
    save_file({"item_table": standard, "instance_mean": mean, "instance_std": std}, path)
    return {"item_width": table.shape[1], "instance_width": instances.shape[1]}


def write_index(
    folder: Path, records: Sequence[PartitionRecord], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the partitions' columns into `index.json`.

    Args:
        folder: Folder that holds the shards and `crm.safetensors`.
        records: Committed partitions, in order.
        facts: Answer ids, template, tokenizer and widths.

    Returns:
        The document, with its digest.
    """
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in schema.SPLITS}
    for record in records:
        name = f"{record.name}.tar"
        columns = {key: record.counts[key] for key in ("n", *_COLUMNS)}
        shards[record.counts["split"]].append({"name": name, **record.files[name], **columns})
    crm = folder / CRM
    document = {
        "format": FORMAT,
        **facts,
        "crm": {"bytes": crm.stat().st_size, "sha256": file_sha256(crm)},
        "splits": {split: _statistics(records, split) for split in schema.SPLITS},
        "shards": shards,
    }
    document["digest"] = digest(document)
    write_json(folder / INDEX, document)
    return document


def _statistics(records: Sequence[PartitionRecord], split: str) -> dict[str, Any]:
    found = [record.counts for record in records if record.counts["split"] == split]
    tokens = np.array([n for counts in found for n in counts["tokens"]], np.int64)
    labels = np.array([n for counts in found for n in counts["labels"]], np.int64)
    dropped = collections.Counter(n for counts in found for n in counts["dropped"])
    return {
        "rows": len(tokens),
        "shards": len(found),
        "tokens_mean": round(float(tokens.mean()), 3) if len(tokens) else 0.0,
        "tokens_max": int(tokens.max(initial=0)),
        "label_mean": round(float(labels.mean()), 6) if len(labels) else 0.0,
        "dropped": {str(count): dropped[count] for count in sorted(dropped)},
        "clipped": int(sum(counts["clipped"] for counts in found)),
    }


def _read_events(
    tables: Path,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Columns item, rating and label of the events."""
    table = read_parquet(tables / "events.parquet", schema.EVENTS)
    return (
        table.column("item").to_numpy(),
        table.column("rating").to_numpy(),
        table.column("label").to_numpy(),
    )


def _moments(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    if not len(rows):
        width = rows.shape[1]
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    wide = rows.astype(np.float64)
    std = wide.std(axis=0)
    floor = _FLOOR * float(std.mean()) or 1.0
    return wide.mean(axis=0).astype(np.float32), np.maximum(std, floor).astype(np.float32)


def _load_matrix(path: Path) -> npt.NDArray[np.float32]:
    try:
        matrix: npt.NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); run `rellax crm` again") from None
    if matrix.ndim != 2:
        raise ArtifactError(f"{path}: has {matrix.ndim} dimensions, not 2; run `rellax crm` again")
    return matrix


def _text_columns(path: Path, required: Mapping[str, pa.DataType]) -> dict[str, list[str | None]]:
    table = read_parquet(path, required)
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    return {name: table.column(name).to_pylist() for name in texts}


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()

"""Writing shards: one partition, one tar, equal input giving equal bytes.

A worker turns a list of (sample, variant) rows into prompts, all at once, and writes them one by
one through webdataset's tar codec with a fixed time stamp; then it reads the closed file back: the
offsets in the index are those found in the file, and a file that does not read back is never
committed. The driver writes the recommender's part once (`crm.safetensors`: the standardised item
table and the scale of h) and merges the partitions' columns (`index`).
"""

from __future__ import annotations

import collections
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rellax_ds import runtime, schema
from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.prompts.assemble import Histories, offsets_of
from rellax_ds.prompts.render import PromptBuilder
from rellax_ds.prompts.templates import Template
from rellax_ds.prompts.tokens import load_tokens
from rellax_ds.shards import pool
from rellax_ds.shards.index import write_columns
from rellax_ds.shards.read import sample_key
from rellax_ds.tables import read_parquet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

    from rellax_ds.partitions import Partition
    from rellax_ds.prompts.render import Prompts
    from rellax_ds.prompts.spans import Cuts

_FLOOR = 0.25
_MOMENT_ROWS = 1 << 16
_ROWS_AT_ONCE = 4096


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
        like_rule: str,
        suffix_variant: bool,
        cuts: Cuts | None = None,
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
            like_rule: What makes a rating a like, as it follows the words "a rating".
            suffix_variant: Name the variant in the key, because a sample is written twice.
            cuts: `PromptBuilder.cuts` of an equal worker; by default the tokenizer is tried here.
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
            {"like_rule": like_rule, "max_rating": f"{max_rating:g}"},
            chat=chat,
            soft_slots=soft_slots,
            max_tokens=max_tokens,
            cuts=cuts,
        )
        scales = load_file(scale)
        self._mean, self._std = scales["instance_mean"], scales["instance_std"]
        self._seen = scales["item_table"].any(axis=1)
        self._instances = np.load(self._crm / "instances.npy", mmap_mode="r", allow_pickle=False)
        self._logits = np.load(self._crm / "logits.npy", mmap_mode="r", allow_pickle=False)
        self._folds = pool.read_folds(self._crm)
        self._height = len(_load_matrix(self._crm / "item_table.npy"))

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Write `PARTITION.tar` and the shard's rows of `samples.parquet`; return its counts."""
        runtime.secure_webdataset()
        import webdataset

        samples = np.array([sample for sample, _ in partition.payload["rows"]], np.int64)
        kinds = [pool.VARIANTS.index(kind) for _, kind in partition.payload["rows"]]
        variants = np.array(kinds, np.int64)
        split = str(partition.payload["split"])
        path = directory / f"{partition.name}.tar"
        columns: dict[str, list[Any]] = {"tokens": [], "label": []}
        dropped: collections.Counter[int] = collections.Counter()
        clipped = 0
        with (
            path.open("wb") as file,
            webdataset.TarWriter(file, mtime=0, encoder=False) as writer,
        ):
            for start in range(0, len(samples), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                batch = self.prompts(samples[rows], variants[rows])
                for sample in batch.encoded(split, self._suffix_variant):
                    writer.write(sample)
                columns["tokens"] += batch.prompts.lengths.tolist()
                columns["label"] += batch.table["label"].tolist()
                dropped.update(batch.num_dropped.tolist())
                clipped += int((batch.prompts.clipped > 0).sum())
        table = {"sample": samples, "variant": variants, **columns}
        write_columns(path, table, self._suffix_variant)
        dropped_counts = {str(count): dropped[count] for count in sorted(dropped)}
        return {"split": split, "n": len(samples), "dropped": dropped_counts, "clipped": clipped}

    def prompts(
        self, samples: npt.NDArray[np.int64], variants: npt.NDArray[np.int64]
    ) -> PromptRows:
        """The prompts of samples, ready to be written.

        Args:
            samples: Sample ids [N].
            variants: Position in `pool.VARIANTS` of the history each shows [N].

        Raises:
            TableError: A history reaches outside its sample's own events.
        """
        rows = pool.take_rows(self._tables / "samples.parquet", list(schema.SAMPLES), samples)
        table = {name: rows.column(name).to_numpy() for name in schema.SAMPLES}
        behaviours = self._behaviours(samples, variants, table)
        events = behaviours.events
        histories = Histories(
            behaviours.offsets,
            self._items[events],
            self._ratings[events],
            self._labels[events],
            behaviours.drop_rank,
        )
        found = self.builder.build_batch(table["user"], table["item"], table["label"], histories)
        instances = (self._instances[samples].astype(np.float32) - self._mean) / self._std
        item_rows = self._item_rows(samples, found)
        tokens = np.stack([found.input_ids, item_rows, found.answers]).astype(np.int32)
        return PromptRows(
            samples,
            variants,
            table,
            behaviours,
            found,
            tokens,
            instances.astype(np.float32),
            self._logits[samples],
        )

    def _item_rows(self, samples: npt.NDArray[np.int64], prompts: Prompts) -> npt.NDArray[np.int64]:
        """Row of the item table at every soft-token slot, else -1 [T]: of the part that belongs to
        the sample's fold, or of the full recommender's, which comes first.
        """
        slots = prompts.slot_items
        rows = slots + 1
        if self._folds is not None:
            part = self._folds[samples].astype(np.int64) + 1
            rows = rows + np.repeat(part * self._height, prompts.lengths)
        return np.where(slots >= 0, np.where(self._seen[rows], rows, 0), -1)

    def _behaviours(
        self,
        samples: npt.NDArray[np.int64],
        variants: npt.NDArray[np.int64],
        table: Mapping[str, npt.NDArray[np.int64]],
    ) -> pool.Behaviours:
        parts = []
        for number, variant in enumerate(pool.VARIANTS):
            places = np.flatnonzero(variants == number)
            if not len(places):
                continue
            ids = samples[places]
            starts, stops = table["history_start"][places], table["history_end"][places]
            if variant == "recent":
                found = pool.recent_histories(starts, stops, self._length)
                pool.check_histories(found.offsets, found.events, starts, stops, ids)
            else:
                offsets, events, similarity = self._retrieved(ids)
                pool.check_histories(offsets, events, starts, stops, ids)
                found = pool.retrieved_histories(offsets, events, similarity, self._length, variant)
            parts.append((places, found))
        return pool.interleave(parts)

    def _retrieved(
        self, samples: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Offsets, event rows in order of time and similarities of samples' retrieved events."""
        if self._retrieval is None:
            raise ArtifactError("retrieved history needs stage 'retrieval'; run it first")
        path = self._retrieval / "retrieved.parquet"
        table = pool.take_rows(path, list(schema.RETRIEVED), samples)
        stated = table.column("sample").to_numpy()
        other = np.flatnonzero(stated != samples)
        if len(other):
            raise TableError(
                f"{path}: row {samples[other[0]]} is of sample {stated[other[0]]};"
                " run `rellax retrieval` again"
            )
        sizes = pc.list_value_length(table.column("events")).to_numpy()
        events, similarity = (
            pc.list_flatten(table.column(name)).to_numpy() for name in ("events", "similarity")
        )
        return offsets_of(sizes), events, similarity


@dataclass(frozen=True)
class PromptRows:
    """N prompts with everything that is written about them.

    Attributes:
        samples: Sample ids [N].
        variants: Positions in `pool.VARIANTS` [N].
        table: Columns of the samples [N].
        behaviours: The history each may show.
        prompts: The prompts, T tokens together.
        tokens: int32 [3, T], see `Sample.tokens`.
        instances: float32 [N, H], standardised.
        crm_logits: float32 [N], the recommender's log-odds of a like.
    """

    samples: npt.NDArray[np.int64]
    variants: npt.NDArray[np.int64]
    table: Mapping[str, npt.NDArray[Any]]
    behaviours: pool.Behaviours
    prompts: Prompts
    tokens: npt.NDArray[np.int32]
    instances: npt.NDArray[np.float32]
    crm_logits: npt.NDArray[np.float32]

    @property
    def num_dropped(self) -> npt.NDArray[np.int64]:
        """Events left out of every prompt because it was too long [N]."""
        gone = np.concatenate([[0], np.cumsum(~self.prompts.kept)])
        dropped: npt.NDArray[np.int64] = np.diff(gone[self.behaviours.offsets])
        return dropped

    def facts(self, n: int, split: str) -> dict[str, Any]:
        """What `sample.json` says about prompt n."""
        place = slice(self.behaviours.offsets[n], self.behaviours.offsets[n + 1])
        kept = self.prompts.kept[place]
        found = {name: int(self.table[name][n]) for name in ("user", "item", "label")}
        return {
            **found,
            "sample": int(self.samples[n]),
            "crm_logit": float(self.crm_logits[n]),
            "split": split,
            "variant": pool.VARIANTS[self.variants[n]],
            "history": self.behaviours.events[place][kept].tolist(),
            "dropped": int((~kept).sum()),
        }

    def encoded(self, split: str, suffix_variant: bool) -> Iterator[dict[str, Any]]:
        """The samples as the tar writer takes them."""
        for n in range(len(self.samples)):
            place = slice(self.prompts.offsets[n], self.prompts.offsets[n + 1])
            text = json.dumps(self.facts(n, split), sort_keys=True, separators=(",", ":"))
            yield {
                "__key__": sample_key(int(self.samples[n]), int(self.variants[n]), suffix_variant),
                "tokens.npy": _npy(self.tokens[:, place]),
                "instance.npy": _npy(self.instances[n]),
                "sample.json": text.encode(),
            }


def write_scale(crm: Path, path: Path, rows: npt.NDArray[np.int64]) -> dict[str, int]:
    """Write `crm.safetensors`: what brings the recommender's outputs to unit scale.

    Item embeddings are standardised per column over the items the recommender has seen; row 0 and
    unseen items stay zero, which is the mean of the seen ones. The tables of its folds, if it has
    any, follow below it, on the same scale. The instance embedding's mean and
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
    item_mean, item_std = _moments(table, np.flatnonzero(seen))
    stacked = np.concatenate([table, *_fold_tables(crm, table.shape)])
    known = stacked.any(axis=1)
    standard = np.zeros(stacked.shape, np.float32)
    standard[known] = (stacked[known] - item_mean) / item_std
    mean, std = _moments(instances, np.sort(rows))
    if not (np.isfinite(standard).all() and np.isfinite(mean).all() and np.isfinite(std).all()):
        raise ArtifactError(f"{crm}: the recommender's outputs are not finite; run `rellax crm`")
    save_file({"item_table": standard, "instance_mean": mean, "instance_std": std}, path)
    return {"item_width": table.shape[1], "instance_width": instances.shape[1]}


def _fold_tables(crm: Path, shape: tuple[int, ...]) -> list[npt.NDArray[np.float32]]:
    path = crm / "fold_tables.npy"
    if not path.exists():
        return []
    tables = np.load(path, allow_pickle=False)
    if tables.ndim != 3 or tables.shape[1:] != shape:
        raise ArtifactError(
            f"{path}: tables of {tables.shape[1:]}, not {shape}; run `rellax crm` again"
        )
    return list(tables)


def _read_events(
    tables: Path,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Columns item, rating and label of the events."""
    wanted = {name: schema.EVENTS[name] for name in ("item", "rating", "label")}
    table = read_parquet(tables / "events.parquet", wanted, only=True)
    return (
        table.column("item").to_numpy(),
        table.column("rating").to_numpy(),
        table.column("label").to_numpy(),
    )


def _moments(
    matrix: npt.NDArray[Any], rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and floored deviation of every column over some rows, read in pieces."""
    width = matrix.shape[1]
    if not len(rows):
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    pieces = np.array_split(rows, 1 + len(rows) // _MOMENT_ROWS)
    mean = sum(matrix[part].sum(axis=0, dtype=np.float64) for part in pieces) / len(rows)
    squares = sum(((matrix[part] - mean) ** 2).sum(axis=0) for part in pieces)
    std = np.sqrt(squares / len(rows))
    floor = _FLOOR * float(std.mean()) or 1.0
    return mean.astype(np.float32), np.maximum(std, floor).astype(np.float32)


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

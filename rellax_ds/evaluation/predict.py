"""Scoring of valid and test with a trained adapter, each sample exactly once.

A split's batches are fixed by the shards and the batch size alone (longest prompts first, so little
is padded); a partition is a run of batches. Who scores a partition, on how many workers and after
which interruption therefore leaves no trace in the scores. The merged table is checked against the
index of the shards: a sample that is missing, doubled or not finite stops the stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rellax_ds.errors import ArtifactError, CheckpointError
from rellax_ds.model import adapter_io
from rellax_ds.partitions import Partition
from rellax_ds.schema import PREDICTIONS, SPLITS, check_table
from rellax_ds.shards.collate import Collator
from rellax_ds.shards.order import eval_batches
from rellax_ds.shards.read import ShardReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from rellax_ds.batch import Batch
    from rellax_ds.shards.read import Sample

    FloatArray = NDArray[np.float32]
    IntArray = NDArray[np.int64]

SCORED_SPLITS = ("valid", "test")
"""Splits the predict stage scores, in order."""

_SAMPLE_DIGITS = 12


def score(
    model: nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu"
) -> tuple[IntArray, FloatArray]:
    """Score batches with a model in eval mode.

    Args:
        model: Its forward takes a batch's tensors and returns (loss, logits [B]).
        batches: What to score, in order.
        device: Where the model is.

    Returns:
        Sample ids, int64 [N], and logits of yes minus no, float32 [N].

    Raises:
        CheckpointError: A logit is not finite.
    """
    ids, logits = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    with torch.inference_mode():
        for batch in batches:
            _, found = model(**batch.to(device).tensors())
            values = found.float().cpu().numpy()
            names = batch.sample_ids.cpu().numpy()
            if not np.isfinite(values).all():
                bad = int(names[~np.isfinite(values)][0])
                raise CheckpointError(
                    f"predict: the logit of sample {bad} is not finite; train the adapter again "
                    "with a lower train.learning_rate"
                )
            ids.append(names)
            logits.append(values)
    return np.concatenate(ids), np.concatenate(logits)


class PredictWorker:
    """Scores one partition of a split; loads the model once an actor."""

    def __init__(
        self,
        *,
        shards: str,
        adapter: str,
        backbone: str,
        device: Literal["cpu", "cuda"],
        precision: Literal["fp32", "bf16"],
        batch_size: int,
    ) -> None:
        """Load adapter and backbone.

        Args:
            shards: Folder of stage 5.
            adapter: Folder of the adapter.
            backbone: Local path or Hugging Face name of the causal LM.
            device: Where to score; on a CPU an actor uses one thread, since actors fill the cores.
            precision: Type of the backbone's weights, that of training.
            batch_size: Prompts in one forward pass.
        """
        if device == "cpu":
            torch.set_num_threads(1)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._device, self._batch_size = device, batch_size
        self._model = adapter_io.load(Path(adapter), backbone, dtype).to(device).eval()
        # The stage has verified the digests before it made the partitions.
        self._readers = {
            split: ShardReader.open(Path(shards), split, verify="size") for split in SCORED_SPLITS
        }
        self._collate = Collator(self._readers[SCORED_SPLITS[0]].index)

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Write `PARTITION.parquet` with the predictions of its batches."""
        split = str(partition.payload["split"])
        reader = self._readers[split]
        batches = eval_batches(reader, self._batch_size)
        chosen = batches[partition.payload["start"] : partition.payload["stop"]]
        samples = [[reader[position] for position in batch.positions] for batch in chosen]
        ids, logits = score(self._model, map(self._collate, samples), self._device)
        flat = [sample for batch in samples for sample in batch]
        if ids.tolist() != [sample.id for sample in flat]:
            raise ArtifactError(f"predict: {partition.name} scored other samples than it read")
        pq.write_table(_table(flat, split, logits), directory / f"{partition.name}.parquet")
        return {"split": split, "rows": len(flat)}


def partitions(
    readers: Mapping[str, ShardReader], batch_size: int, partition_rows: int
) -> list[Partition]:
    """Runs of whole batches, about `partition_rows` samples each, for every scored split."""
    step = max(1, partition_rows // batch_size)
    return [
        Partition(f"{split}-{number:05d}", {"split": split, "start": start, "stop": start + step})
        for split in SCORED_SPLITS
        for number, start in enumerate(
            range(0, len(eval_batches(readers[split], batch_size)), step)
        )
    ]


def expected_samples(readers: Mapping[str, ShardReader]) -> dict[str, IntArray]:
    """Sample ids the shards hold for every scored split, by split."""
    return {
        split: np.array([int(key[:_SAMPLE_DIGITS]) for key in readers[split].keys], np.int64)
        for split in SCORED_SPLITS
    }


def merge(paths: Sequence[Path], expected: Mapping[str, IntArray]) -> pa.Table:
    """Join the partitions' files into one table sorted by (split, sample).

    Args:
        paths: Parquet files of `PREDICTIONS`.
        expected: Sample ids that must appear exactly once, by split.

    Raises:
        ArtifactError: A sample is missing, doubled, of the wrong split or has no finite logit.
    """
    tables = [check_table(pq.read_table(path), PREDICTIONS, str(path)) for path in paths]
    empty = pa.schema(list(PREDICTIONS.items())).empty_table()
    table = pa.concat_tables([empty, *tables]).sort_by(
        [("split", "ascending"), ("sample", "ascending")]
    )
    check_exactly_once(table, expected)
    return table


def check_exactly_once(table: pa.Table, expected: Mapping[str, IntArray]) -> None:
    """Check that the predictions hold every expected sample once, nothing else, and no NaN.

    Raises:
        ArtifactError: They do not; names the first offending sample.
    """
    remedy = "run `rellax predict` again"
    split, sample = table["split"].to_numpy(), table["sample"].to_numpy()
    for name, wanted in expected.items():
        found, counts = np.unique(sample[split == SPLITS.index(name)], return_counts=True)
        missing = np.setdiff1d(wanted, found)
        foreign = np.setdiff1d(found, wanted)
        for what, ids in (
            ("is scored more than once", found[counts > 1]),
            ("has no score", missing),
            ("is scored but not in the shards", foreign),
        ):
            if ids.size:
                raise ArtifactError(
                    f"predict: {name} sample {ids[0]} {what} ({ids.size} such samples); {remedy}"
                )
    if table.num_rows != sum(len(wanted) for wanted in expected.values()):
        raise ArtifactError(f"predict: {table.num_rows} rows include other splits; {remedy}")
    finite = np.isfinite(table["logit"].to_numpy())
    if not finite.all():
        bad = int(sample[~finite][0])
        raise ArtifactError(f"predict: the logit of sample {bad} is not finite; {remedy}")


def _table(samples: Sequence[Sample], split: str, logits: FloatArray) -> pa.Table:
    columns: dict[str, Any] = {
        "sample": [sample.id for sample in samples],
        "user": [sample.facts["user"] for sample in samples],
        "item": [sample.facts["item"] for sample in samples],
        "split": [SPLITS.index(split)] * len(samples),
        "label": [sample.label for sample in samples],
        "logit": logits,
    }
    return pa.table({name: pa.array(columns[name], kind) for name, kind in PREDICTIONS.items()})

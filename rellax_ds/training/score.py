"""Valid scores during training: every rank forwards its share, every sample is counted once.

Scores travel with their sample ids, so uneven shares, fillers and the number of ranks leave no
trace in the metric; what is gathered is sorted by id before anything is computed from it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rellax_ds import metrics, runtime
from rellax_ds.errors import ShardError, TableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from rellax_ds.batch import Batch
    from rellax_ds.engine.engine import Engine


@dataclass(frozen=True)
class Scores:
    """Labels and logits of all samples of a split, in the order of their ids.

    Attributes:
        ids: Sample ids, ascending, int64 [N].
        users: int64 [N].
        labels: 0 or 1, float64 [N].
        logits: Yes minus no, float64 [N].
        crm_logits: The recommender's, float64 [N].
    """

    ids: npt.NDArray[np.int64]
    users: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float64]
    logits: npt.NDArray[np.float64]
    crm_logits: npt.NDArray[np.float64]

    def shifted(self, by: float) -> Scores:
        """The same scores with `by` subtracted from every logit."""
        return replace(self, logits=self.logits - by)

    def blended(self, blend: Sequence[float]) -> Scores:
        """The same scores beside the recommender's: a, w, b of `rellax_ds.model.residual`."""
        of_crm, of_llm, offset = blend
        return replace(self, logits=of_crm * self.crm_logits + of_llm * self.logits + offset)

    def metrics(self) -> dict[str, float]:
        """AUC, log loss and accuracy over all samples; GAUC and NDCG@10 within users, where any
        user has rows of both labels.
        """
        found = {
            "auc": metrics.auc(self.labels, self.logits),
            "log_loss": metrics.log_loss(self.labels, self.logits),
            "accuracy": metrics.accuracy(self.labels, self.logits),
            "ndcg_10": metrics.ndcg(self.users, self.labels, self.logits),
        }
        with contextlib.suppress(TableError):  # every user has rows of one label
            found["gauc"] = metrics.gauc(self.users, self.labels, self.logits).value
        return found


def score_split(
    engine: Engine,
    batches: Iterable[tuple[Batch, bool]],
    num_samples: int,
    before_batch: Callable[[], None],
) -> Scores:
    """Score a split on all ranks; a collective.

    Args:
        engine: The engine.
        batches: This rank's share, equally many on every rank; True marks a filler whose scores
            are another rank's.
        num_samples: Samples of the split.
        before_batch: Called before every forward pass, to leave when asked to stop.

    Raises:
        ShardError: A sample was scored twice or not at all.
    """
    rows: list[npt.NDArray[np.float64]] = []
    with runtime.Progress("valid", num_samples, "samples") as progress:
        for batch, repeated in batches:
            before_batch()
            logits = engine.score(batch)
            if not repeated:
                columns = (batch.sample_ids, batch.users, batch.labels, logits, batch.crm_logits)
                rows.append(np.stack([c.numpy() for c in columns], axis=1, dtype=np.float64))
            scored = batch.size * engine.processes.world_size
            progress.advance(min(scored, num_samples - progress.done))
    local = np.concatenate(rows) if rows else np.zeros((0, 5))
    table = np.concatenate(engine.processes.gather(local))
    ids, first = np.unique(table[:, 0], return_index=True)
    if not len(ids) == len(table) == num_samples:
        raise ShardError(
            f"valid: {num_samples} samples gave {len(table)} scores of {len(ids)} distinct ones; "
            "rebuild the shards with `rellax shards`"
        )
    users = table[first, 1].astype(np.int64)
    return Scores(ids.astype(np.int64), users, *table[first, 2:].T)

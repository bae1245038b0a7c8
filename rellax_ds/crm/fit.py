"""Training of the recommender: binary cross entropy on train, selection on valid AUC.

The latest `crm.holdout` share of train is left out altogether (no gradient, no vocabulary), so that
the LLM can later learn on rows whose embeddings were not fitted to their labels. The run is a
function of its inputs and the seed: batches, initial weights and dropout come from seeds of their
own and the process's random state is left as it was. On one thread count it repeats bit for bit.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rellax_ds import metrics, runtime
from rellax_ds.crm.features import Features, build_vocabulary
from rellax_ds.crm.kinds import build
from rellax_ds.crm.network import Architecture, training_loss
from rellax_ds.errors import ConfigError, TableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rellax_ds.config import CRMConfig
    from rellax_ds.crm.features import History, IntArray, Interactions, Vocabulary
    from rellax_ds.crm.network import Recommender

_SCORING_BATCH = 2048


@dataclass(frozen=True)
class Fitted:
    """A trained recommender.

    Attributes:
        model: The network of the best epoch, in eval mode.
        vocabulary: Values it was trained on.
        features: Its view of the tables.
        train_rows: Sample ids it was trained on.
        holdout_start: First held-out sample id of train, or None.
        epochs: One record an epoch: its number, mean training loss and valid AUC.
    """

    model: Recommender
    vocabulary: Vocabulary
    features: Features
    train_rows: IntArray
    holdout_start: int | None
    epochs: list[dict[str, Any]]

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights these are, from 1; the first of those with the best valid AUC."""
        aucs = [record["valid_auc"] for record in self.epochs]
        return 1 + aucs.index(max(aucs))


def split_holdout(train: IntArray, share: float) -> tuple[IntArray, int | None]:
    """Cut the latest `share` of the training samples off.

    Args:
        train: Sample ids of the training split in time order.
        share: Share to hold out, in [0, 1).

    Returns:
        The sample ids to train on, and the first held-out id (None when nothing is).
    """
    kept = len(train) - int(share * len(train))
    return train[:kept], int(train[kept]) if kept < len(train) else None


def fit(log: Interactions, history: History, config: CRMConfig, seed: int) -> Fitted:
    """Train a recommender and keep the epoch with the best valid AUC.

    Raises:
        TableError: Valid holds one class only.
        ConfigError: The loss is not finite.
    """
    train_rows, holdout_start = split_holdout(log.split_rows("train"), config.holdout)
    valid_rows = log.split_rows("valid")
    positives = int(log.label[valid_rows].sum())
    if positives in {0, len(valid_rows)}:
        raise TableError(
            f"valid holds {positives} likes in {len(valid_rows)} samples, so no epoch can be "
            "selected on it; change data.split or data.label_threshold"
        )
    vocabulary = build_vocabulary(log, history, train_rows, config)
    fitted = fit_rows(log, history, config, seed, train_rows, vocabulary)
    return replace(fitted, holdout_start=holdout_start)


def fit_rows(
    log: Interactions,
    history: History,
    config: CRMConfig,
    seed: int,
    train_rows: IntArray,
    vocabulary: Vocabulary,
    num_epochs: int | None = None,
) -> Fitted:
    """Train a recommender on given rows.

    Args:
        log: Users, items, events and samples.
        history: History the recommender reads.
        config: The recipe's section.
        seed: Equal seeds and vocabularies of equal sizes start from equal weights.
        train_rows: Sample ids to train on.
        vocabulary: Values with an embedding.
        num_epochs: Train so many epochs and keep the last; by default the epoch with the best
            valid AUC is kept.

    Raises:
        ConfigError: The loss is not finite.
    """
    features = Features(log, history, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runtime.stable_seed(seed, "crm"))
        model = build(Architecture.of(config, vocabulary))
        with torch.no_grad():
            model.table.weight[1 + np.array(vocabulary.unseen_items, np.int64)] = 0
        trainer = _Trainer(model, features, log.label, config, seed)
        if num_epochs is None:
            epochs = trainer.run(train_rows, log.split_rows("valid"))
        else:
            epochs = trainer.run_for(num_epochs, train_rows)
    return Fitted(model.eval(), vocabulary, features, train_rows, None, epochs)


@torch.inference_mode()
def score(
    model: Recommender, features: Features, samples: IntArray
) -> Iterator[tuple[IntArray, NDArray[np.float32], NDArray[np.float32]]]:
    """Score samples in eval mode, a batch at a time.

    Yields:
        Sample ids [B], logits [B] and instance embeddings [B, H].
    """
    model.eval()
    for start in range(0, len(samples), _SCORING_BATCH):
        rows = samples[start : start + _SCORING_BATCH]
        found = model(features.gather(rows))
        yield rows, found.logit.numpy(), found.instance.numpy()


class _Trainer:
    def __init__(
        self,
        model: Recommender,
        features: Features,
        labels: NDArray[np.int8],
        config: CRMConfig,
        seed: int,
    ) -> None:
        self.model, self.features, self.labels = model, features, labels
        self.config, self.seed = config, seed
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def run(self, train_rows: IntArray, valid_rows: IntArray) -> list[dict[str, Any]]:
        config, epochs = self.config, []
        best_auc, best_state, best_epoch = -1.0, copy.deepcopy(self.model.state_dict()), 0
        with runtime.Progress("crm", config.max_epochs * len(train_rows), "rows") as progress:
            for epoch in range(1, config.max_epochs + 1):
                start = time.monotonic()
                loss = self._epoch(epoch, train_rows, progress)
                logits = [logit for _, logit, _ in score(self.model, self.features, valid_rows)]
                auc = metrics.auc(self.labels[valid_rows], np.concatenate(logits))
                seconds = time.monotonic() - start
                epochs.append({"epoch": epoch, "loss": loss, "valid_auc": auc})
                runtime.logger.info(
                    "crm: epoch %d, loss %.4f, valid AUC %.4f, %.1f s", epoch, loss, auc, seconds
                )
                if auc > best_auc:
                    best_auc, best_epoch = auc, epoch
                    best_state = copy.deepcopy(self.model.state_dict())
                elif epoch - best_epoch >= config.patience:
                    break
        self.model.load_state_dict(best_state)
        return epochs

    def run_for(self, num_epochs: int, train_rows: IntArray) -> list[dict[str, Any]]:
        """Train a fixed number of epochs; nothing is selected."""
        epochs = []
        with runtime.Progress("crm", num_epochs * len(train_rows), "rows") as progress:
            for epoch in range(1, num_epochs + 1):
                loss = self._epoch(epoch, train_rows, progress)
                epochs.append({"epoch": epoch, "loss": loss})
        return epochs

    def _epoch(self, epoch: int, rows: IntArray, progress: runtime.Progress) -> float:
        self.model.train()
        order = np.random.default_rng(runtime.stable_seed(self.seed, "crm", epoch))
        shuffled, total = order.permutation(rows), torch.zeros((), dtype=torch.float64)
        for start in range(0, len(shuffled), self.config.batch_size):
            batch = shuffled[start : start + self.config.batch_size]
            labels = torch.from_numpy(self.labels[batch].astype(np.float32))
            found = self.model(self.features.gather(batch))
            loss = training_loss(found, labels, self.config.auxiliary_weight)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.detach().double() * len(batch)
            progress.advance(len(batch))
        mean = float(total) / len(rows)
        if not np.isfinite(mean):
            raise ConfigError(
                f"crm.learning_rate {self.config.learning_rate}: the loss is {mean} in epoch "
                f"{epoch}; lower it"
            )
        return mean

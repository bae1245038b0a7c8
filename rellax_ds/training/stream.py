"""The shards as the loop sees them: micro-batches by step, and valid in equal shares.

A step's micro-batches are numbered over all ranks, and the random state is derived from that
number, so the ranks' count changes neither what is cut nor which dropout mask a sample meets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rellax_ds import runtime
from rellax_ds.errors import ShardError
from rellax_ds.shards.collate import Collator
from rellax_ds.shards.order import eval_batches, spread, step_batches, steps_per_epoch
from rellax_ds.shards.read import ShardIndex, ShardReader
from rellax_ds.training.scored import SHOWN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rellax_ds.batch import Batch
    from rellax_ds.config import Recipe
    from rellax_ds.shards.read import Sample


class PromptStream:
    """One rank's view of the training and valid prompts.

    Attributes:
        steps_per_epoch: Optimiser steps in an epoch.
        num_valid: Samples of the valid split.
        base_rate: Share of positive targets in training, kept off 0 and 1.
        identity: Digest of the shards.
        index: Their index: answer ids, widths.
    """

    def __init__(self, folder: Path, recipe: Recipe, rank: int, world_size: int) -> None:
        """Open both splits, checking the index and the sizes of the shards; see `verify`.

        Args:
            folder: Folder of stage 5.
            recipe: Seed and training section.
            rank: This rank.
            world_size: Number of ranks.

        Raises:
            ShardError: The shards are absent, damaged or hold no valid sample.
            ConfigError: A global batch is larger than the training split.
        """
        index = ShardIndex.open(folder)
        self._train, self._valid = (ShardReader(index, s, "size") for s in ("train", "valid"))
        if not len(self._valid):
            raise ShardError(
                f"{folder}: the valid split is empty, nothing can be selected on it; raise "
                "shards.valid_rows and run `rellax shards`"
            )
        self._settings, self._seed = recipe.train, recipe.seed
        self._rank, self._world_size = rank, world_size
        self.index, self.identity = index, index.digest
        self._collate = Collator(self.index, recipe.train.history_weight)
        self.steps_per_epoch = steps_per_epoch(len(self._train), recipe.train.global_batch)
        self.num_valid = len(self._valid)
        rows = len(self._train)
        self.base_rate = (float(self._train.labels.sum()) + 0.5) / (rows + 1)

    def verify(self) -> None:
        """Check every byte of both splits, where `train.verify` asks for it; one rank does it for
        all, and every rank checks a sample's own checksum when it reads it.

        Raises:
            ShardError: A shard differs from the index.
        """
        if self._settings.verify == "size":
            runtime.logger.info("train: shards are checked by size and sample only (train.verify)")
            return
        for reader in (self._train, self._valid):
            reader.verify()

    def micro_batches(self, step: int) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches of a step of the run, each with its number over all ranks."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        batches = step_batches(
            self._train,
            self._seed,
            epoch,
            step_of_epoch,
            self._settings.global_batch,
            self._settings.micro_batch,
            self._rank,
            self._world_size,
        )
        for count, positions in enumerate(batches):
            number = count * self._world_size + self._rank
            yield number, self._collate([self._train[position] for position in positions])

    def valid(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's valid batches; True marks a filler whose scores are another rank's."""
        batches = eval_batches(self._valid, self._settings.eval_batch, self._rank, self._world_size)
        for positions, repeated in batches:
            yield self._collate([self._valid[position] for position in positions]), repeated

    def watched(self) -> list[Sample]:
        """The few valid prompts whose scores are shown one by one."""
        return [self._valid[position] for position in spread(self._valid.samples, SHOWN)]

    def close(self) -> None:
        """Close the shards' files."""
        self._train.close()
        self._valid.close()

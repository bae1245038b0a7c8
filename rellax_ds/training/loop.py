"""The training loop, one screen long: score, checkpoint, leave or step.

Everything a step depends on is a function of (seed, step) or lies in the checkpoint, so a run that
was killed and resumed is the run that was not. The loop's own state is a few numbers, and `run`
asks for a due score first: a stop during a score is scored again, a stop between two steps
continues with the next one.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from rellax_ds import metrics, runtime
from rellax_ds.blend import START, fit_blend
from rellax_ds.errors import CheckpointError, RellaxError
from rellax_ds.model import adapter_io
from rellax_ds.redaction import redacted
from rellax_ds.training.schedule import rate_factor, warmup_steps
from rellax_ds.training.score import Scores, score_split
from rellax_ds.training.throughput import Throughput

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rellax_ds.config import Recipe
    from rellax_ds.engine.checkpoint import CheckpointStore
    from rellax_ds.engine.engine import Engine
    from rellax_ds.model.rellax import ReLLaX
    from rellax_ds.training.signals import StopRequest
    from rellax_ds.training.sinks import Sinks
    from rellax_ds.training.stream import PromptStream

ADAPTER = "adapter"
"""Folder of the best adapter so far, in the running folder and in every checkpoint."""


class StopTraining(Exception):  # noqa: N818  # not an error: the run was asked to leave
    """The training was asked to stop and has left a checkpoint, if it could."""


@dataclass
class LoopState:
    """What a resumed run has to know; a checkpoint stores it as JSON.

    Attributes:
        step: Optimiser steps taken; also the position in the data.
        skipped: Steps among them that were skipped for a non-finite gradient.
        skipped_in_a_row: Those at the end of the run so far.
        scored: Step of the last valid score; -1 before the first.
        centre: What the model subtracts from its logit.
        blend: Weights of recommender and LLM and the constant of `model.residual`, or None.
        best_step: Step of the best valid AUC after training began, None before; 0 if there is no
            training.
        best_auc: That AUC.
        stale: Valid scores since then.
        untrained: Valid metrics before the first step.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    scored: int = -1
    centre: float = 0.0
    blend: list[float] | None = None
    best_step: int | None = None
    best_auc: float = 0.0
    stale: int = 0
    untrained: dict[str, float] | None = None


class Loop:
    """One training run over an engine and a stream of prompts."""

    def __init__(
        self,
        engine: Engine,
        stream: PromptStream,
        recipe: Recipe,
        store: CheckpointStore,
        sinks: Sinks,
        stop: StopRequest,
        directory: Path,
        state: LoopState,
    ) -> None:
        """Take the parts; `directory` receives the best adapter, `state` is fresh or restored."""
        self.engine, self.stream, self.train = engine, stream, recipe.train
        self.model = cast("ReLLaX", engine.model)
        self.store, self.sinks, self.stop = store, sinks, stop
        self.directory, self.state, self.seed = directory, state, recipe.seed
        self.total = recipe.train.epochs * stream.steps_per_epoch
        epochs = recipe.train.schedule_epochs or recipe.train.epochs
        self.horizon = epochs * stream.steps_per_epoch
        self.warmup = warmup_steps(recipe.train.warmup, self.horizon)
        self.recipe = recipe
        processes = engine.processes
        self.throughput = Throughput(self.model, processes.device, processes.world_size)
        self._set_centre(state.centre)
        if self.model.residual is not None:
            self._set_blend(state.blend)

    def run(self) -> LoopState:
        """Train to the end, or until valid stops improving.

        Returns:
            The final state; the best adapter is in the running folder.

        Raises:
            StopTraining: A stop was asked for; a checkpoint of the last whole step is committed.
            CheckpointError: No adapter could be written.
            RellaxError: `train.max_skips` steps in a row had a non-finite gradient.
        """
        while True:
            if self._score_due():
                self._score()
                self._checkpoint_if_due()
            if self.state.step >= self.total or self._gave_up():
                if self.state.best_step is None:
                    raise CheckpointError(
                        f"{self.directory / ADAPTER}: no adapter of this training could be "
                        "written; make room and run the same command again"
                    )
                return self.state
            with self._progress() as progress:
                while not self._score_due():
                    self.advance(progress)
                    if not self._score_due():
                        self._checkpoint_if_due()

    def advance(self, progress: runtime.Progress) -> None:
        """Take the next optimiser step, log it and show it."""
        loss = self._step()
        skipped = f", {self.state.skipped} skipped" if self.state.skipped else ""
        progress.advance(self.train.global_batch, f"loss {loss:.4f}{skipped}")

    def _step(self) -> float:
        """Take one optimiser step; returns its loss over all ranks."""
        state = self.state
        self.throughput.start()
        factor = rate_factor(
            self.train.schedule, state.step - state.skipped, self.horizon, self.warmup
        )
        self.engine.processes.at(f"step {state.step + 1}")
        self.engine.set_rate(factor)
        loss = tokens = 0.0
        for index, batch in self.throughput.batches(self.stream.micro_batches(state.step)):
            self._leave_if_asked()
            loss += self.engine.accumulate(batch, self.seed, state.step, index)
            tokens += batch.num_tokens
        outcome = self.engine.outcome()
        loss, tokens, waited = self.engine.processes.sum([loss, tokens, self.throughput.waited])
        state.step += 1
        state.skipped += outcome.skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if outcome.skipped else 0
        loss *= self.train.micro_batch / self.train.global_batch
        record = {
            "event": "step",
            "step": state.step,
            "loss": loss,
            "rate": factor,
            "learning_rate": self.train.learning_rate * factor,
            "gradient_norm": outcome.gradient_norm,
            "skipped": state.skipped,
        }
        speed = self.throughput.describe(self.train.global_batch, tokens, waited)
        self.sinks.write(record | speed)
        self._mind_skips(outcome.skipped)
        return loss

    def _score(self) -> None:
        state = self.state
        self.engine.processes.at(f"the valid score after step {state.step}")
        self.model.llm_alone = True  # beside the recommender from here on, by a blend of this score
        scores = score_split(
            self.engine, self.stream.valid(), self.stream.num_valid, self._leave_if_asked
        )
        if state.step == 0 and self.train.centre_logit:
            wanted = metrics.logit([self.stream.base_rate])[0]
            if self.model.residual is not None:
                wanted = 0.0  # the recommender's logit holds the base rate
            shift = float(scores.logits.mean() - wanted)
            scores = scores.shifted(self._set_centre(shift))
        self.model.llm_alone = False
        if self.model.residual is not None:
            scores = scores.blended(self._set_blend(self._fitted_blend(scores)))
        found = scores.metrics()
        state.scored = state.step
        if state.step == 0:
            state.untrained = found
        if state.step > 0 or self.total == 0:  # what is never trained is kept as it is
            self._keep_if_best(found["auc"])
        self.sinks.write(
            {"event": "valid", "step": state.step, "rows": len(scores.labels)}
            | found
            | {"centre": state.centre, "blend": state.blend, "best_step": state.best_step}
        )
        self.sinks.show(state.step, scores)
        if self.engine.processes.first:
            runtime.logger.info(
                "train: step %d of %d, valid AUC %.4f, log loss %.4f%s",
                *(state.step, self.total, found["auc"], found["log_loss"]),
                "" if state.step else " (untrained)",
            )

    def _keep_if_best(self, auc: float) -> None:
        state = self.state
        if state.best_step is not None and auc <= state.best_auc:
            state.stale += 1
            return
        state.stale = 0
        if self._keep_adapter():
            state.best_step, state.best_auc = state.step, auc

    def _checkpoint(self) -> None:
        self.engine.processes.at(f"the checkpoint of step {self.state.step}")
        self.store.save(
            self.engine,
            self.state.step,
            checkpoint_state(self.state, self.recipe, self.stream),
            {ADAPTER: self.directory / ADAPTER},
            self.state.best_step,
        )

    def _keep_adapter(self) -> bool:
        """Replace the best adapter by the current one; the gather comes before any file.

        Returns:
            Whether it was written; if not, the one before is still whole and remains the best.
        """
        collected = adapter_io.collect(self.model)

        def replace() -> str | None:
            fresh, target = self.directory / f".{ADAPTER}", self.directory / ADAPTER
            shutil.rmtree(fresh, ignore_errors=True)
            assert collected is not None, "rank 0 holds what was gathered"
            try:
                adapter_io.write(collected, fresh)
            except CheckpointError as error:
                shutil.rmtree(fresh, ignore_errors=True)
                return str(error)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
            return None

        failure = self.engine.processes.from_rank_zero(replace)
        if failure is not None and self.engine.processes.first:
            best = self.state.best_step
            runtime.logger.warning(
                "train: the adapter of step %d, the best so far, was not kept: %s; %s, training "
                "goes on",
                *(self.state.step, failure),
                "none is kept yet" if best is None else f"that of step {best} stays",
            )
        return failure is None

    def _leave_if_asked(self) -> None:
        if not self.stop.agreed():
            return
        self._checkpoint()
        reason = self.stop.reason or "a stop on another rank"
        raise StopTraining(
            f"train: stopped at step {self.state.step} of {self.total} on {reason}; "
            "the same command continues from there"
        )

    def _mind_skips(self, skipped: bool) -> None:
        if not skipped:
            return
        step, row = self.state.step, self.state.skipped_in_a_row
        if row >= self.train.max_skips:
            raise RellaxError(
                f"train: {row} steps in a row up to step {step} had a non-finite loss or gradient "
                "(train.max_skips); lower train.learning_rate or look at the data of these steps"
            )
        if self.engine.processes.first:
            runtime.logger.warning("train: step %d skipped, its gradient is not finite", step)

    def _progress(self) -> runtime.Progress:
        rows = self.train.global_batch
        done = self.state.step * rows
        return runtime.Progress("train", self.total * rows, "samples", done=done)

    def _score_due(self) -> bool:
        step, every = self.state.step, self.train.eval_every or self.stream.steps_per_epoch
        return step != self.state.scored and (step % every == 0 or step == self.total)

    def _checkpoint_if_due(self) -> None:
        step, every = self.state.step, self.train.checkpoint_every
        if step > 0 and (step % every == 0 if every else step == self.state.scored):
            self._checkpoint()

    def _gave_up(self) -> bool:
        return self.train.patience is not None and self.state.stale >= self.train.patience

    def _fitted_blend(self, scores: Scores) -> Sequence[float]:
        """The same on every rank, to the bit."""
        parts = (scores.labels, scores.crm_logits, scores.logits)
        return self.engine.processes.from_rank_zero(lambda: fit_blend(*parts))

    def _set_blend(self, blend: Sequence[float] | None) -> Sequence[float]:
        """Give a residual its blend; returns it as the model's precision holds it."""
        assert self.model.residual is not None
        self.model.residual.blend.copy_(torch.tensor(START if blend is None else blend))
        self.state.blend = self.model.residual.blend.tolist()
        return self.state.blend

    def _set_centre(self, value: float) -> float:
        """Give the model its centre; returns it as the model's precision holds it."""
        self.model.centre.fill_(value)
        self.state.centre = float(self.model.centre)
        return self.state.centre


def checkpoint_state(state: LoopState, recipe: Recipe, stream: PromptStream) -> dict[str, Any]:
    """What a checkpoint stores beside the tensors: the loop's state and what it belongs to."""
    return {
        "loop": asdict(state),
        "seed": recipe.seed,
        "global_batch": recipe.train.global_batch,
        "shards": stream.identity,
        "recipe": redacted(recipe.model_dump(mode="json", include={"model", "train"})),
    }

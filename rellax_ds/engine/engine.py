"""The DeepSpeed engine behind few calls: build, accumulate, score.

Under ZeRO-3 the model is born partitioned: while the factory runs, transformers sees the resolved
configuration and shards every weight as it loads it. The optimiser is torch's AdamW over named
groups, also where its state is offloaded: what is trained is small, so nothing has to be compiled
for it. Random state is never saved: generators are reseeded before every micro-batch, so a resumed
step draws the dropout masks of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rellax_ds import runtime
from rellax_ds.engine.ds_config import EPSILON, zero_stage
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from rellax_ds.batch import Batch
    from rellax_ds.config import TrainConfig
    from rellax_ds.engine.processes import Processes

STAGES = (2, 3)
"""ZeRO stages this project trains under: optimiser and gradients partitioned, or weights too."""


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share a learning rate and a weight decay.

    Attributes:
        name: Unique; the checkpoint stores hyperparameters under it.
        parameters: Name within the model to parameter.
        learning_rate: Peak rate; the schedule multiplies it.
        weight_decay: AdamW's decoupled decay.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class StepOutcome:
    """The gradient's norm before clipping, and whether the step was skipped for it."""

    gradient_norm: float
    skipped: bool


class Engine:
    """A model under ZeRO-3 with its optimiser.

    Attributes:
        processes: The ranks of the job.
        groups: Parameter groups, in the optimiser's order.
        deepspeed: DeepSpeed's engine; for `checkpoint.py` only.
    """

    def __init__(
        self,
        make_model: Callable[[], tuple[nn.Module, Sequence[ParameterGroup]]],
        train: TrainConfig,
        resolved: dict[str, Any],
        processes: Processes,
    ) -> None:
        """Build the model partitioned and wrap it.

        Args:
            make_model: Loads the model and names its trainable groups; runs on every rank.
            train: The recipe's training section, for AdamW's betas.
            resolved: From `resolve_ds_config`.
            processes: From `start_processes`.

        Raises:
            ConfigError: The configuration asks for a ZeRO stage other than 2 or 3.
        """
        if zero_stage(resolved) not in STAGES:
            raise ConfigError(
                f"{train.ds_config}: zero_optimization.stage is {zero_stage(resolved)}, this "
                "project trains and checkpoints under stages 2 and 3; set it to one of them"
            )
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        self.processes = processes
        self._transformers_view = HfDeepSpeedConfig(resolved)
        model, groups = make_model()
        self.groups = tuple(groups)
        optimizer = _optimizer(self.groups, train)
        with contextlib.redirect_stdout(sys.stderr):
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=resolved, dist_init_required=False
            )
        runtime.release_memory()  # what loading and partitioning left lies under every step's peak

    @property
    def model(self) -> nn.Module:
        """The wrapped model; its parameters are empty outside a forward pass or a gather."""
        module: nn.Module = self.deepspeed.module
        return module

    @property
    def num_accumulated(self) -> int:
        """Micro-batches of each rank behind one optimiser step."""
        return int(self.deepspeed.gradient_accumulation_steps())

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Name to parameter of everything the optimiser changes."""
        return {name: p for group in self.groups for name, p in group.parameters.items()}

    def set_rate(self, factor: float) -> None:
        """Set every group's learning rate to its peak times `factor`."""
        for state, group in zip(self.deepspeed.optimizer.param_groups, self.groups, strict=True):
            state["lr"] = group.learning_rate * factor

    def accumulate(self, batch: Batch, *seed: object) -> float:
        """Add a micro-batch's gradient; the last one of a step also updates the weights.

        Args:
            batch: This rank's micro-batch.
            seed: What the random state is derived from: the recipe's seed, the step and the
                micro-batch's number over all ranks.

        Returns:
            The loss of the micro-batch on this rank.
        """
        self.model.train()
        runtime.seed_everything(*seed)
        loss, _ = self.deepspeed(**batch.to(self.processes.device).tensors())
        self.deepspeed.backward(loss)
        self._skipped_before = self.deepspeed.skipped_steps
        self.deepspeed.step()
        return float(loss.detach())

    def outcome(self) -> StepOutcome:
        """What the step just taken did; the same on every rank."""
        norm = self.deepspeed.get_global_grad_norm()
        return StepOutcome(
            gradient_norm=float("nan") if norm is None else float(norm),
            skipped=self.deepspeed.skipped_steps > self._skipped_before,
        )

    @torch.no_grad()
    def score(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch's targets without dropout, float32 [B] on the CPU.

        A collective: every rank calls it equally often.
        """
        self.model.eval()
        _, logits = self.deepspeed(**batch.to(self.processes.device).tensors())
        return logits.float().cpu()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()


def _optimizer(groups: Sequence[ParameterGroup], train: TrainConfig) -> torch.optim.Optimizer:
    options: list[dict[str, Any]] = [
        {
            "params": list(group.parameters.values()),
            "lr": group.learning_rate,
            "weight_decay": group.weight_decay,
            "name": group.name,
        }
        for group in groups
    ]
    return torch.optim.AdamW(options, betas=train.betas, eps=EPSILON)

"""How the gates of a batch reach the layers: one object owned by the tuner, no global, no patch.

The gates of all layers are made together, before the layers run. A recomputation under gradient
checkpointing happens after that block has ended, so `ConditionedCheckpoint` hands the gates to the
checkpoint as inputs, which is what its two modes both know how to treat: a gradient comes back for
each and flows into the gate networks once.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rellax_ds.kernels.rows import Rows
    from rellax_ds.model.interaction import StackedInteraction


@dataclass(frozen=True)
class Conditions:
    """What one forward pass is conditioned on.

    Attributes:
        gates: Adapter name to G [S, r, r] of every adapted layer, M = G^T.
        rows: Owner of each token row; None is a padded batch [S, L, d].
    """

    gates: Mapping[str, Sequence[torch.Tensor]]
    rows: Rows | None = None


class GateContext:
    """Hands gates to the layers.

    Attributes:
        current: Conditions of the running forward; None outside one.
        interactions: Adapter name to its gate networks; they belong to the tuner.
    """

    def __init__(self) -> None:
        self.current: Conditions | None = None
        self.interactions: dict[str, StackedInteraction] = {}

    @contextlib.contextmanager
    def set(self, conditions: Conditions | None) -> Iterator[None]:
        """Hold `conditions` within the block and put back what was held before."""
        previous, self.current = self.current, conditions
        try:
            yield
        finally:
            self.current = previous

    @property
    def rows(self) -> Rows | None:
        """Rows of the running forward."""
        return None if self.current is None else self.current.rows

    def gates(self, adapter: str, layer: int, samples: int) -> torch.Tensor:
        """G [S, r, r] of one layer.

        Outside a forward, a matrix that is the same for every sample is given for `samples` of
        them.

        Raises:
            ConfigError: The adapter is conditioned on h and no gates are set.
        """
        if self.current is not None and adapter in self.current.gates:
            return self.current.gates[adapter][layer]
        interaction = self.interactions[adapter]
        if not interaction.input_independent:
            raise ConfigError(
                f"adapter '{adapter}' is conditioned on h and no gates are set; run the model "
                "inside `with model.base_model.conditioned(instance):`, and enable gradient "
                "checkpointing on the PEFT model, not on the model inside it"
            )
        nobody = torch.empty(samples, 0)
        return interaction.per_layer(nobody)[layer]

    def matrix(self, adapter: str, layer: int) -> torch.Tensor:
        """M [r, r] of one layer, where it is the same for every sample.

        Raises:
            ConfigError: It is not.
        """
        return self.interactions[adapter].matrices()[layer]


class ConditionedCheckpoint:
    """A checkpoint function under which a block is recomputed with the gates of its forward pass.

    Works for reentrant and non-reentrant checkpoints. torch restores its random generator for the
    recomputation, and the dropout of the operator draws its seed there, so the masks are the same.

    Attributes:
        checkpoint: The function to call, as transformers made it.
        context: The tuner's context.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: GateContext) -> None:
        self.checkpoint = checkpoint
        self.context = context

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run(*args, **kwargs)` with its activations recomputed in the backward pass."""
        held = self.context.current
        if held is None:
            return self.checkpoint(run, *args, **kwargs)
        counts = {adapter: len(gates) for adapter, gates in held.gates.items()}
        flat = [gate for gates in held.gates.values() for gate in gates]

        def again(*given: Any, **named: Any) -> Any:
            rest = iter(given)
            gates = {name: [next(rest) for _ in range(n)] for name, n in counts.items()}
            with self.context.set(Conditions(gates, held.rows)):
                return run(*rest, **named)

        return self.checkpoint(again, *flat, *args, **kwargs)

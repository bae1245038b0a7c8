"""Where DeepSpeed keeps what its optimiser works on: the one file that knows its attributes.

Under ZeRO-3 each rank holds a flat piece of every parameter, padded to equal sizes; under ZeRO-2 a
flat piece of every group, cut without regard to parameters. Both are read and written here one
whole parameter at a time. Two facts about DeepSpeed 0.19 shape the code: its optimiser has no state
before the first step, and its setters of whole tensors fail under ZeRO-3 on sizes that the number
of ranks does not divide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rellax_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by the name torch and DeepSpeed use."""

PARAMETER = "param"
"""What a parameter's own value is called beside its moments."""


def ensure_moments(optimizer: Any) -> None:
    """Give every piece of a DeepSpeed optimiser around AdamW its moments and a step counter of its
    own.

    Raises:
        CheckpointError: This version of DeepSpeed keeps its pieces elsewhere.
    """
    for _, piece in _pieces(optimizer):
        state = optimizer.optimizer.state[piece]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(piece.data)
    if not _partitions_parameters(optimizer):
        # DeepSpeed links states after its first group's first step, when other groups have none
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def adam_steps(optimizer: Any) -> dict[int, int]:
    """Adam's step counter by number of the parameter group."""
    return {
        group: int(optimizer.optimizer.state[piece]["step"]) for group, piece in _pieces(optimizer)
    }


def set_adam_steps(optimizer: Any, steps: list[int]) -> None:
    """Set the step counter of every group."""
    for group, piece in _pieces(optimizer):
        optimizer.optimizer.state[piece]["step"] = torch.tensor(float(steps[group]))


def whole(parameter: nn.Parameter, kind: str) -> torch.Tensor:
    """A parameter's fp32 value, or one of its moments, whole on every rank; a collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == PARAMETER:
        return safe_get_full_fp32_param(parameter)  # type: ignore[no-any-return]
    return safe_get_full_optimizer_state(parameter, kind)  # type: ignore[no-any-return]


def set_own_part(parameter: nn.Parameter, value: torch.Tensor, kind: str, rank: int) -> None:
    """Write this rank's part of a whole fp32 value or moment.

    Args:
        parameter: A trained parameter of the engine.
        value: The whole tensor, on the CPU.
        kind: `PARAMETER` or one of `MOMENTS`.
        rank: This rank.
    """
    from deepspeed import utils

    if hasattr(parameter, "ds_id"):
        part = _padded_part(parameter, value, rank)
        if kind == PARAMETER:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)
    elif kind == PARAMETER:
        utils.safe_set_full_fp32_param(parameter, value.to(parameter.device))
    else:
        utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)


def write_weights(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Copy whole values into the weights that the forward pass reads; a collective."""
    import deepspeed

    partitioned = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        for name, parameter in parameters.items():
            if parameter.numel():
                parameter.copy_(values[name].to(parameter.dtype))


def _pieces(optimizer: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of the parameter group, and flat fp32 tensor, of every piece this rank updates."""
    if _partitions_parameters(optimizer):
        for index, piece in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield optimizer.sub_group_to_group_id[index], piece
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from enumerate(optimizer.single_partition_of_fp32_groups)
    else:
        raise CheckpointError(
            "this DeepSpeed version keeps its partitions elsewhere; install deepspeed>=0.19.8,<0.20"
        )


def _partitions_parameters(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _padded_part(parameter: nn.Parameter, value: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's piece of a whole tensor, zero-padded as DeepSpeed pads it."""
    share = int(parameter.partition_numel())  # type: ignore[attr-defined]
    piece = torch.zeros(share, dtype=torch.float32)
    own = value.flatten()[share * rank : share * (rank + 1)]
    piece[: own.numel()] = own
    return piece.to(parameter.device)

"""Training state as one file that any number of ranks can restore.

What is trained is small, so every trainable parameter and its two Adam moments are gathered whole
and written as one safetensors file: no pickle, no per-rank shards, no conversion. Restoring pads
each tensor to the partition size of the ranks at hand and writes each rank's part. At the same
number of ranks this is exact to the bit; at another it is exact up to the rounding of sums.

Two facts about DeepSpeed 0.19 shape the code. Its setters of whole tensors fail on sizes that the
number of ranks does not divide, hence the local ones and the padding. And its optimiser has no
state before the first step, hence `_ensure_moments`, the only function here that touches an
attribute outside its public interface.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rellax_ds.config import digest
from rellax_ds.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from rellax_ds.engine.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by the name torch and DeepSpeed use."""

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def capture(engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gather the trainable state; a collective.

    Args:
        engine: The engine between two optimiser steps.

    Returns:
        On rank 0 the tensors by key (`param/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`) on the CPU
        and the facts beside them: step counters and each group's hyperparameters by its name. On
        other ranks no tensors.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _ensure_moments(engine)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in engine.trainable.items():
        whole = {"param": safe_get_full_fp32_param(parameter)}
        for moment in MOMENTS:
            whole[moment] = safe_get_full_optimizer_state(parameter, moment)
        if engine.processes.first:
            for kind, tensor in whole.items():
                tensors[f"{kind}/{name}"] = tensor.detach().float().cpu().clone()
    states = engine.deepspeed.optimizer.param_groups
    facts = {
        "global_steps": engine.deepspeed.global_steps,
        "skipped_steps": engine.deepspeed.skipped_steps,
        "groups": {
            group.name: {key: state[key] for key in _HYPERPARAMETERS} | {"step": step}
            for group, state, step in zip(engine.groups, states, _adam_steps(engine), strict=True)
        },
        "names": _names_digest(engine.trainable),
    }
    return tensors, facts


def write(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write what `capture` returned as one safetensors file."""
    save_file(tensors, path, metadata={"facts": json.dumps(facts, sort_keys=True)})


def restore(engine: Engine, path: Path) -> None:
    """Put a captured state into a fresh engine, on any number of ranks.

    Args:
        engine: An engine that has taken no step.
        path: File written by `write`; every rank reads it.

    Raises:
        CheckpointError: The file's parameters are not those of the model.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            _check_names(engine.trainable, set(file.keys()), path)
            _ensure_moments(engine)
            parameters = {}
            for name, parameter in engine.trainable.items():
                whole = file.get_tensor(f"param/{name}")
                _check_shape(name, parameter, whole, path)
                parameters[name] = whole
                safe_set_local_fp32_param(parameter, _own_part(engine, parameter, whole))
                for moment in MOMENTS:
                    part = _own_part(engine, parameter, file.get_tensor(f"{moment}/{name}"))
                    safe_set_local_optimizer_state(parameter, part, moment)
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project: {error}") from None
    _write_weights(engine, parameters)
    _write_hyperparameters(engine, facts, path)
    engine.deepspeed.global_steps = facts["global_steps"]
    engine.deepspeed.skipped_steps = facts["skipped_steps"]
    engine.deepspeed.micro_steps = facts["global_steps"] * engine.num_accumulated


def _own_part(engine: Engine, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's partition of a whole tensor, zero-padded as DeepSpeed pads it."""
    share = int(parameter.partition_numel())  # type: ignore[attr-defined]
    flat = torch.zeros(share * engine.processes.world_size, dtype=torch.float32)
    flat[: whole.numel()] = whole.flatten()
    start = share * engine.processes.rank
    return flat[start : start + share].to(engine.processes.device)


def _write_weights(engine: Engine, parameters: dict[str, torch.Tensor]) -> None:
    """Copy the values into the weights the forward pass reads."""
    import deepspeed

    trainable = engine.trainable
    with (
        torch.no_grad(),
        deepspeed.zero.GatheredParameters(list(trainable.values()), modifier_rank=0),
    ):
        if engine.processes.first:
            for name, parameter in trainable.items():
                parameter.copy_(parameters[name].to(parameter.dtype))


def _write_hyperparameters(engine: Engine, facts: dict[str, Any], path: Path) -> None:
    optimizer = engine.deepspeed.optimizer
    saved = facts["groups"]
    if set(saved) != {group.name for group in engine.groups}:
        names = ", ".join(group.name for group in engine.groups)
        raise CheckpointError(
            f"{path}: holds parameter groups {', '.join(sorted(saved))}, the model has {names}"
        )
    for group, state in zip(engine.groups, optimizer.param_groups, strict=True):
        for key in _HYPERPARAMETERS:
            value = saved[group.name][key]
            state[key] = tuple(value) if isinstance(state[key], tuple) else value
    for index, partition in enumerate(optimizer.fp32_partitioned_groups_flat):
        group = engine.groups[optimizer.sub_group_to_group_id[index]]
        step = saved[group.name]["step"]
        state = optimizer.optimizer.state[partition]
        state["step"] = torch.tensor(float(step)) if torch.is_tensor(state["step"]) else int(step)


def _ensure_moments(engine: Engine) -> None:
    """Give every partition of the optimiser its moments and its own step counter."""
    optimizer = engine.deepspeed.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        raise CheckpointError(
            "this DeepSpeed version keeps its partitions elsewhere; install deepspeed>=0.19.8,<0.20"
        )
    for partition in optimizer.fp32_partitioned_groups_flat:
        state = optimizer.optimizer.state[partition]
        if "step" not in state:
            torch_adam = isinstance(optimizer.optimizer, torch.optim.AdamW)
            state["step"] = torch.tensor(0.0) if torch_adam else 0
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(partition.data)


def _adam_steps(engine: Engine) -> list[int]:
    """Adam's step counter of each parameter group."""
    optimizer = engine.deepspeed.optimizer
    steps = [0] * len(engine.groups)
    for index, partition in enumerate(optimizer.fp32_partitioned_groups_flat):
        step = int(optimizer.optimizer.state[partition]["step"])
        steps[optimizer.sub_group_to_group_id[index]] = step
    return steps


def _names_digest(trainable: dict[str, nn.Parameter]) -> str:
    return digest({name: list(_shape(p)) for name, p in trainable.items()})


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_names(trainable: dict[str, nn.Parameter], keys: set[str], path: Path) -> None:
    expected = {f"{kind}/{name}" for kind in ("param", *MOMENTS) for name in trainable}
    if keys != expected:
        missing, extra = sorted(expected - keys), sorted(keys - expected)
        first = f"lacks '{missing[0]}'" if missing else f"holds the unknown '{extra[0]}'"
        raise CheckpointError(
            f"{path}: {first} ({len(missing)} missing, {len(extra)} unknown tensors); "
            "it belongs to another model or adapter configuration"
        )


def _check_shape(name: str, parameter: nn.Parameter, whole: torch.Tensor, path: Path) -> None:
    if tuple(whole.shape) != _shape(parameter):
        raise CheckpointError(
            f"{path}: '{name}' has shape {tuple(whole.shape)}, the model's is {_shape(parameter)}"
        )

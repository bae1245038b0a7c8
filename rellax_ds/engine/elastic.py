"""Training state as one file that any number of ranks can restore.

What is trained is small, so every trainable parameter and its two Adam moments are gathered whole
and written as one safetensors file: no pickle, no per-rank shards, no conversion. Restoring gives
each rank its part for the ranks at hand. At the same number of ranks this is exact to the bit; at
another it is exact up to the rounding of sums.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rellax_ds.config import digest
from rellax_ds.engine import fragments
from rellax_ds.engine.fragments import MOMENTS, PARAMETER
from rellax_ds.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from rellax_ds.engine.engine import Engine

_KINDS = (PARAMETER, *MOMENTS)
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
    fragments.ensure_moments(engine.deepspeed.optimizer)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in engine.trainable.items():
        for kind in _KINDS:
            found = fragments.whole(parameter, kind)
            if engine.processes.first:
                tensors[f"{kind}/{name}"] = found.detach().float().cpu().clone()
    states = engine.deepspeed.optimizer.param_groups
    steps = fragments.adam_steps(engine.deepspeed.optimizer)
    facts = {
        "global_steps": engine.deepspeed.global_steps,
        "skipped_steps": engine.deepspeed.skipped_steps,
        "groups": {
            group.name: {key: state[key] for key in _HYPERPARAMETERS} | {"step": steps[number]}
            for number, (group, state) in enumerate(zip(engine.groups, states, strict=True))
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
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            _check_names(engine.trainable, set(file.keys()), path)
            fragments.ensure_moments(engine.deepspeed.optimizer)
            values = {}
            for name, parameter in engine.trainable.items():
                for kind in _KINDS:
                    value = file.get_tensor(f"{kind}/{name}")
                    _check_shape(name, parameter, value, path)
                    fragments.set_own_part(parameter, value, kind, engine.processes.rank)
                    if kind == PARAMETER:
                        values[name] = value
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of this project: {error}") from None
    fragments.write_weights(engine.trainable, values)
    _write_hyperparameters(engine, facts, path)
    engine.deepspeed.global_steps = facts["global_steps"]
    engine.deepspeed.skipped_steps = facts["skipped_steps"]
    engine.deepspeed.micro_steps = facts["global_steps"] * engine.num_accumulated


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
    steps = [int(saved[group.name]["step"]) for group in engine.groups]
    fragments.set_adam_steps(optimizer, steps)


def _names_digest(trainable: dict[str, nn.Parameter]) -> str:
    return digest({name: list(_shape(p)) for name, p in trainable.items()})


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_names(trainable: dict[str, nn.Parameter], keys: set[str], path: Path) -> None:
    expected = {f"{kind}/{name}" for kind in _KINDS for name in trainable}
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

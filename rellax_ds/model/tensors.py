"""Tensor files of an adapter: read as safetensors only, and compared with a model by name and
shape, both ways.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from rellax_ds.errors import CheckpointError
from rellax_ds.model.backbone import full_shape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: The file is missing or damaged; only safetensors is read, never a pickle.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def check_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Compare names and shapes both ways.

    Raises:
        CheckpointError: A tensor is missing, unknown, empty or of another shape; names the first.
    """
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} tensors are missing, first '{missing[0]}'")
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors do not belong to this model, first '{unknown[0]}'"
        )
    for name, tensor in found.items():
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{path}: '{name}' is empty; it was saved without gathering its ZeRO-3 parts"
            )
        if tuple(tensor.shape) != full_shape(wanted[name]):
            raise CheckpointError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}, the model needs "
                f"{full_shape(wanted[name])}"
            )

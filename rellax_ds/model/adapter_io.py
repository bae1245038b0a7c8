"""Saving and loading what was trained: adapter, projector and how to read them, in safetensors
only.

Under ZeRO-3 a careless save writes tensors of shape (0,) without an error, so saving has two steps:
`collect` gathers on every rank and keeps whole copies on rank 0, `write` puts them into a folder,
reads the files back and compares every name, shape and value with the model. No collective runs
after the first byte is written, so a full disk on one rank cannot hang the others.

    adapter_config.json, adapter_model.safetensors   stock PEFT, after `import rellax_ds`
    spa.safetensors                                  the projector, when there is one
    rellax.json                                      answer ids, centre, widths, recipe section
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as to_bytes

from rellax_ds import runtime
from rellax_ds.artifacts import write_bytes, write_json
from rellax_ds.blend import START
from rellax_ds.config import ModelConfig
from rellax_ds.errors import CheckpointError
from rellax_ds.model import cflora, spa
from rellax_ds.model.backbone import gathered
from rellax_ds.model.rellax import ReLLaX, adapter_parameters, assemble
from rellax_ds.model.tensors import check_tensors, read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

META = "rellax.json"
_FORMAT = 1


@dataclass(frozen=True)
class AdapterState:
    """Whole tensors on the CPU, those beside the adapter by file, and the two documents."""

    adapter: dict[str, torch.Tensor]
    parts: dict[str, dict[str, torch.Tensor]]
    config: dict[str, Any]
    meta: dict[str, Any]


def collect(model: ReLLaX) -> AdapterState | None:
    """Gather the adapter; every rank must call it. Rank 0 gets the state, the others None.

    Raises:
        CheckpointError: A gathered tensor does not have its full shape.
    """
    groups = adapter_parameters(model).values()
    with gathered(parameter for group in groups for parameter in group.values()):
        if runtime.rank() != 0:
            return None
        adapter = _copies(cflora.adapter_tensors(model.llm))
        parts = {file: _copies(tensors) for file, tensors in _parts(model).items()}
    for tensors in (adapter, *parts.values()):
        _refuse_empty(tensors)
    return AdapterState(adapter, parts, _adapter_config(model), _meta(model))


def write(state: AdapterState, folder: Path) -> None:
    """Write a collected adapter into a folder and verify it by reading it back.

    Raises:
        CheckpointError: The files cannot be written, or do not hold what was collected.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / cflora.SETTINGS, state.config)
        write_json(folder / META, state.meta)
        write_bytes(folder / cflora.WEIGHTS, to_bytes(state.adapter, {"format": "pt"}))
        for file, tensors in state.parts.items():
            write_bytes(folder / file, to_bytes(tensors, {"format": "pt"}))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write the adapter: {error}") from error
    _verify(folder / cflora.WEIGHTS, state.adapter)
    for file, tensors in state.parts.items():
        _verify(folder / file, tensors)


def save(model: ReLLaX, folder: Path) -> None:
    """Collect on every rank and write on rank 0; there is no barrier, so the caller decides when
    ranks meet again.
    """
    state = collect(model)
    if state is not None:
        write(state, folder)


def load(folder: Path, backbone_reference: str, dtype: torch.dtype = torch.float32) -> ReLLaX:
    """Build the model of a saved adapter, in eval mode, for scoring without DeepSpeed.

    Args:
        folder: What `save` wrote.
        backbone_reference: Local folder or Hugging Face name of the same causal LM.
        dtype: Type of the backbone's weights.

    Raises:
        CheckpointError: A file is missing or damaged, or does not fit this backbone.
    """
    meta = read_meta(folder)
    config = meta["model"]
    model = assemble(
        backbone_reference,
        config,
        meta["answer_ids"],
        meta["item_dim"],
        meta["instance_dim"],
        dtype,
        meta["loss"],
    )
    restore(model, folder)
    model.centre.fill_(meta["centre"])
    if model.residual is not None:
        model.residual.blend.copy_(torch.tensor(meta["blend"]))
    return model.eval()


def restore(model: ReLLaX, folder: Path) -> None:
    """Copy every tensor of a saved adapter into a model of the same recipe, before
    `deepspeed.initialize`.

    Raises:
        CheckpointError: Names or shapes differ in either direction.
    """
    _copy_in(cflora.adapter_tensors(model.llm), folder / cflora.WEIGHTS)
    for file, tensors in _parts(model).items():
        _copy_in(tensors, folder / file)


def read_meta(folder: Path) -> dict[str, Any]:
    """`rellax.json` of an adapter folder; `model` is a `ModelConfig`.

    Raises:
        CheckpointError: The file is missing, damaged or of another format.
    """
    path = folder / META
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise CheckpointError(f"{path}: format {meta['format']}, this version reads {_FORMAT}")
        needed = ("answer_ids", "centre", "item_dim", "instance_dim", "layers", "loss", "model")
        absent = [key for key in needed if key not in meta]
        if absent:
            raise CheckpointError(f"{path}: '{absent[0]}' is missing")
        meta["model"] = ModelConfig(**meta["model"])
        if meta["model"].residual != "none" and len(meta["blend"] or ()) != len(START):
            raise CheckpointError(f"{path}: 'blend' is not three numbers")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path}: not a readable adapter description ({error})") from error
    return meta


def _parts(model: ReLLaX) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters beside the PEFT adapter, by the file that holds them."""
    return {} if model.spa is None else {spa.WEIGHTS: dict(model.spa.named_parameters())}


def _adapter_config(model: ReLLaX) -> dict[str, Any]:
    config = copy.copy(model.llm.peft_config[cflora.ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = model.config.backbone
    return cflora.settings_document(config)


def _meta(model: ReLLaX) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "answer_ids": model.answer_ids,
        "centre": float(model.centre),
        "blend": None if model.residual is None else model.residual.blend.tolist(),
        "item_dim": model.item_dim,
        "layers": cflora.adapted_layers(model.llm),
        "instance_dim": model.instance_dim,
        "loss": model.loss,
        "model": model.config.model_dump(mode="json", exclude={"adapter"}),
        "versions": runtime.versions(),
    }


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _refuse_empty(tensors: Mapping[str, torch.Tensor]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise CheckpointError(
            f"{len(empty)} adapter tensors are empty, first '{empty[0]}'; "
            "they were not gathered under ZeRO-3"
        )


def _verify(path: Path, written: Mapping[str, torch.Tensor]) -> None:
    found = read_tensors(path)
    check_tensors(found, written, path)
    for name, tensor in found.items():
        if not torch.equal(tensor, written[name]) and not bool(tensor.isnan().any()):
            raise CheckpointError(f"{path}: '{name}' reads back with other values")


def _copy_in(wanted: Mapping[str, torch.Tensor], path: Path) -> None:
    saved = read_tensors(path)
    check_tensors(saved, wanted, path)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])

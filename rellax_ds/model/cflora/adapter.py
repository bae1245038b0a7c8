"""An adapter's life outside the forward pass: put on a model, started from another, exported."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft.tuners.lora import LoraConfig
from safetensors.torch import save as to_bytes
from torch import nn
from transformers.pytorch_utils import Conv1D

from rellax_ds.artifacts import write_bytes, write_json
from rellax_ds.errors import CheckpointError, ConfigError
from rellax_ds.family import INTERACTION_FIELDS
from rellax_ds.model.cflora.config import CFLoraConfig
from rellax_ds.model.cflora.layer import MERGE_REFUSED, CFLoraLinear
from rellax_ds.model.cflora.tuner import CONTAINER
from rellax_ds.model.tensors import check_tensors, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.config import ModelConfig

ADAPTER = "default"
"""Name of the adapter that `attach` adds."""

WEIGHTS = "adapter_model.safetensors"
"""File of an adapter folder that holds the tensors."""

SETTINGS = "adapter_config.json"
"""File of an adapter folder that holds the configuration."""


def attach(base: Any, config: ModelConfig, instance_dim: int) -> Any:
    """Put the recipe's adapter on a causal LM.

    Returns:
        The `PeftModel`; its `base_model` is the `CFLoraModel`.

    Raises:
        ConfigError: No layer of the backbone is a target, or one is not linear.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    for target in config.target_modules:
        if target not in linear:
            raise ConfigError(
                f"model.target_modules: the backbone has no linear layer '{target}'; "
                f"it has {', '.join(sorted(linear))}"
            )
    settings = CFLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
        instance_dim=None if config.spec.input_independent else instance_dim,
        **config.model_dump(include=set(INTERACTION_FIELDS)),
    )
    with warnings.catch_warnings():
        # PEFT itself reads a name that newer transformers renamed; users can do nothing about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return peft.get_peft_model(base, settings, adapter_name=ADAPTER)


def start_from(llm: Any, folder: Path) -> None:
    """Copy A, B and, where both sides have them, the gates of a saved adapter into a fresh one.

    The folder may hold a plain PEFT LoRA. Gates the folder lacks keep their initial value.

    Raises:
        CheckpointError: The folder holds no adapter for exactly these layers and shapes, or its
            gates are of another kind.
    """
    saved = read_tensors(folder / WEIGHTS)
    wanted = adapter_tensors(llm)
    optional = {name for name in wanted if f".{CONTAINER}." in name}
    gated = bool(optional) and any(f".{CONTAINER}." in name for name in saved)
    _check_origin(llm, folder, gated)
    saved = {
        name: tensor
        for name, tensor in saved.items()
        if name in wanted or f".{CONTAINER}." not in name
    }
    if not gated:
        wanted = {name: parameter for name, parameter in wanted.items() if name not in optional}
    check_tensors(saved, wanted, folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def adapter_tensors(llm: Any, adapter_name: str = ADAPTER) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter by the name PEFT's file format gives it; references, not
    copies.
    """
    state: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
        llm, dict(llm.named_parameters()), adapter_name, save_embedding_layers=False
    )
    return state


def adapted_layers(llm: Any) -> list[str]:
    """Names of the adapted layers, in the order of their gates: `layers.3.self_attn.q_proj`."""
    found = [name for name, m in llm.named_modules() if isinstance(m, CFLoraLinear)]
    return [name.removeprefix("base_model.model.").removeprefix("model.") for name in found]


def settings_document(config: LoraConfig) -> dict[str, Any]:
    """An adapter's configuration as `adapter_config.json` holds it."""
    document: dict[str, Any] = config.to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in document.items()}


def export_lora(llm: Any, folder: Path, adapter_name: str = ADAPTER) -> None:
    """Write the plain LoRA that equals an adapter whose M is the same for every sample.

    A' = M A and B' = B, so no rank is lost and nothing is approximated; any program that reads
    PEFT's LoRA folders can serve it.

    Args:
        llm: The `PeftModel`.
        folder: Gets `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: Which adapter.

    Raises:
        ConfigError: M depends on the sample.
        CheckpointError: The adapter is partitioned by ZeRO-3, or the files cannot be written.
    """
    config: CFLoraConfig = llm.peft_config[adapter_name]
    if config.conditional:
        raise ConfigError(MERGE_REFUSED.format(adapter=adapter_name).replace("merged", "exported"))
    if any(hasattr(parameter, "ds_id") for parameter in llm.parameters()):
        raise CheckpointError(
            "cannot export a partitioned adapter; save it, load it in one process and export there"
        )
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in adapter_tensors(llm, adapter_name).items()
        if f".{CONTAINER}." not in name
    }
    for name, layer in llm.named_modules():
        if isinstance(layer, CFLoraLinear) and adapter_name in layer.lora_A:
            tensors[f"{name}.lora_A.weight"] = layer.plain_down(adapter_name).detach().cpu()
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    plain = LoraConfig(**{name: copy.copy(getattr(config, name)) for name in names})
    plain.inference_mode = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / WEIGHTS, to_bytes(tensors, {"format": "pt"}))
        write_json(folder / SETTINGS, settings_document(plain))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write the adapter: {error}") from error


def _check_origin(llm: Any, folder: Path, gated: bool) -> None:
    try:
        saved = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no readable adapter_config.json ({error})") from error
    ours = llm.peft_config[ADAPTER]
    if saved.lora_alpha / saved.r != ours.lora_alpha / ours.r:
        raise CheckpointError(
            f"{folder}: trained with alpha / rank = {saved.lora_alpha} / {saved.r}, the recipe has "
            f"{ours.lora_alpha} / {ours.r}; set model.alpha to match"
        )
    if gated and saved.spec.function != ours.spec.function:
        raise CheckpointError(
            f"{folder}: its gates compute {saved.spec.function}, the recipe wants "
            f"{ours.spec.function}; set the model.interaction fields to match"
        )

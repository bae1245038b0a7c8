"""Every parameter of a recipe's model, counted without loading a weight.

The model is built on torch's meta device by the code that builds it for training, so a count here
cannot drift from what is trained. The backbone needs its config only: the local one if there is
one, else the one that ships with this package under the backbone's name, written from public facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from rellax_ds.assets import resolve_model
from rellax_ds.errors import AssetError, ConfigError
from rellax_ds.model import cflora
from rellax_ds.model.rellax import ReLLaX, adapter_parameters
from rellax_ds.model.spa import SoftPromptProjector

if TYPE_CHECKING:
    from rellax_ds.config import ModelConfig

CONFIGS = Path(__file__).parent / "configs"
"""Shipped configs, ORGANISATION--NAME.json."""

# Layers that read one tensor, which the operator then keeps once.
_READS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention"}
_READS |= {"gate_proj": "mlp", "up_proj": "mlp"}


@dataclass(frozen=True)
class Weight:
    """One parameter tensor.

    Attributes:
        name: Its name in the model.
        numel: Its elements.
        group: `backbone`, `factors`, `interaction` or `spa`.
        trained: Whether the optimiser changes it.
        quantised: Whether `model.quantization` applies to it: the weight of a linear layer of the
            backbone other than the head.
    """

    name: str
    numel: int
    group: str
    trained: bool
    quantised: bool = False

    @property
    def module(self) -> str:
        """The module whose forward gathers it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Decoder:
    """Widths of a dense decoder-only transformer, in elements for one token.

    Attributes:
        hidden: H, the residual stream.
        intermediate: Width of the MLP.
        layers: Number of blocks.
        query: Of all query heads.
        key_value: Of all key heads; as many for the values.
        normed: Inputs of a block's norms, together.
        adapted: Distinct inputs of adapted layers, over the whole model.
        vocabulary: V.
    """

    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    normed: int
    adapted: int
    vocabulary: int


@dataclass(frozen=True)
class ModelShape:
    """All that memory follows from: the parameters, in the model's order, and the widths."""

    weights: tuple[Weight, ...]
    decoder: Decoder

    def count(self, group: str, trained: bool) -> int:
        """Parameters of a group that are trained, or frozen."""
        return sum(w.numel for w in self.weights if (w.group, w.trained) == (group, trained))


def read_config(backbone: str) -> tuple[Any, str]:
    """The backbone's Hugging Face config and where it came from, without a download.

    Args:
        backbone: `model.backbone`: asset name, Hugging Face name or local path.

    Raises:
        AssetError: It is neither there nor shipped.
        ConfigError: Its config cannot be used.
    """
    shipped = CONFIGS / f"{backbone.replace('/', '--')}.json"
    try:
        reference = resolve_model(backbone).reference
        return AutoConfig.from_pretrained(reference, local_files_only=True), "its local config"
    except (AssetError, OSError) as error:
        if shipped.is_file():
            return AutoConfig.from_pretrained(shipped), "the config shipped with rellax-ds"
        if isinstance(error, AssetError):
            raise
    except ValueError as error:
        raise ConfigError(f"model.backbone '{backbone}': {str(error).splitlines()[0]}") from None
    names = ", ".join(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")))
    raise AssetError(
        f"model.backbone '{backbone}' has no config on this machine and none is shipped; give a "
        f"folder with its config.json, or one of {names}"
    )


def shape_of(config: Any, model: ModelConfig, item_dim: int, instance_dim: int) -> ModelShape:
    """Build the recipe's model on the meta device and list its parameters.

    Args:
        config: The backbone's Hugging Face config.
        model: The recipe's model section.
        item_dim: E, width of the recommender's item embeddings.
        instance_dim: Width of the instance embedding h.

    Raises:
        ConfigError: The config is of no causal LM, or a target module is not in it.
    """
    with torch.device("meta"):
        try:
            # not `from_config`, which partitions the model while a ZeRO-3 engine is alive
            base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        except (KeyError, ValueError, ImportError) as error:
            raise ConfigError(
                f"model.backbone '{model.backbone}': no causal LM follows from its config "
                f"({str(error).splitlines()[0]})"
            ) from None
        base.requires_grad_(False)
        linear = _quantisable(base)
        spa = None
        if model.spa:
            width = base.get_input_embeddings().embedding_dim
            spa = SoftPromptProjector(item_dim, width, model.spa_bottleneck)
        llm = cflora.attach(base, model, instance_dim)
        whole = ReLLaX(llm, spa, model, {"yes": 0, "no": 1}, item_dim, instance_dim)
    adapters = adapter_parameters(whole)
    if not model.train_factors:
        for parameter in adapters["factors"].values():
            parameter.requires_grad_(False)
    group_of = {name: group for group, found in adapters.items() for name in found}
    weights = tuple(
        Weight(
            name,
            parameter.numel(),
            group_of.get(name, "backbone"),
            parameter.requires_grad,
            model.quantization != "none" and id(parameter) in linear,
        )
        for name, parameter in whole.named_parameters()
    )
    return ModelShape(weights, _decoder(config, whole, model.train_factors))


def _quantisable(base: Any) -> set[int]:
    """Identities of the weights that a 4-bit loading packs."""
    head = base.get_output_embeddings()
    layers = (m for m in base.modules() if isinstance(m, nn.Linear) and m is not head)
    return {id(layer.weight) for layer in layers}


def _decoder(config: Any, model: ReLLaX, train_factors: bool) -> Decoder:
    text = config.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or hidden // heads)
    query = heads * head
    key_value = int(getattr(text, "num_key_value_heads", None) or heads) * head
    inputs: dict[tuple[str, str], int] = {}
    for name, layer in model.named_modules():
        if train_factors and isinstance(layer, cflora.CFLoraLinear):
            parent, _, last = name.rpartition(".")
            inputs[parent, _READS.get(last, last)] = int(layer.in_features)
    norms_heads = any(name.endswith(".q_norm") for name, _ in model.named_modules())
    return Decoder(
        hidden=hidden,
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        layers=int(text.num_hidden_layers),
        query=query,
        key_value=key_value,
        normed=2 * hidden + (query + key_value if norms_heads else 0),
        adapted=sum(inputs.values()),
        vocabulary=int(text.vocab_size),
    )

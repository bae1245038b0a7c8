"""CFLoRA as a PEFT method: a LoRA whose two factors meet through an interaction matrix M(h) of each
sample.

y = W0 x + s B M(h) A x. Importing this module registers the method `CFLORA` with PEFT (the one
import of ours with a side effect, and the one extension of another library's table), after which
`get_peft_model`, `save_pretrained` and `PeftModel.from_pretrained` work as for any other method;
loading such an adapter without this import fails loudly.

The gates of all layers are computed together by one module that the tuner owns, so PEFT saves and
loads it with the adapter and ZeRO-3 gathers it once a step. They reach the layers through one
context object, also owned by the tuner: no global, no patched forward, and the backbone's code does
not know.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

import rellax_ds
from rellax_ds.errors import CheckpointError, ConfigError
from rellax_ds.family import INTERACTION_FIELDS, InteractionSpec
from rellax_ds.model.interaction import stacked_interaction
from rellax_ds.model.tensors import check_tensors, read_tensors
from rellax_ds.ops import Factors, cflora

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from rellax_ds.config import ModelConfig
    from rellax_ds.family import Head, Init, Kind
    from rellax_ds.model.interaction import StackedInteraction

CONTAINER = "cflora_interaction"
"""Attribute of the tuner that holds the stacked gate networks, one per adapter."""

ADAPTER = "default"
"""Name of the adapter that `attach` adds."""

WEIGHTS = "adapter_model.safetensors"
"""File of an adapter folder that holds the tensors."""


@dataclass
class CFLoraConfig(LoraConfig):  # type: ignore[misc]  # PEFT is untyped
    """LoRA's configuration and what M(h) needs.

    Attributes:
        interaction: The kind of M; see `rellax_ds.family`, also for the fields up to
            `interaction_shared`. `full`: one dense matrix per layer and sample; `identity`: plain
            LoRA.
        instance_dim: Width of h.
        plugin: Module to import before PEFT can load the adapter.
        plugin_version: Version of rellax_ds that wrote it.
    """

    interaction: Kind = "full"
    interaction_init: Init = "identity"
    interaction_head: Head = "mlp"
    interaction_hidden: int | None = None
    interaction_factors: int | None = None
    interaction_experts: int = 4
    interaction_temperature: float = 1.0
    interaction_shared: bool = False
    instance_dim: int | None = None
    plugin: str = field(default="rellax_ds.model.cflora")
    plugin_version: str = field(default=rellax_ds.__version__)

    def __post_init__(self) -> None:
        """Refuse what the method does not define."""
        super().__post_init__()
        self.peft_type = PeftType.CFLORA
        unsupported = (
            "use_dora",
            "lora_bias",
            "layer_replication",
            "rank_pattern",
            "alora_invocation_tokens",
        )
        for name in unsupported:
            if getattr(self, name, None):
                raise ConfigError(
                    f"CFLoRA does not support {name} = {getattr(self, name)!r}; leave it unset"
                )
        if self.conditional and not self.instance_dim:
            raise ConfigError(
                f"interaction '{self.interaction}' needs instance_dim, the width of the instance "
                "embedding h"
            )

    @property
    def spec(self) -> InteractionSpec:
        """What the interaction fields say about M(h)."""
        return InteractionSpec.of(self, self.r)

    @property
    def conditional(self) -> bool:
        """Whether M depends on the sample, so the adapter cannot be folded into the weights."""
        return not self.spec.input_independent


class GateContext:
    """Hands the gates of the running forward to the layers.

    Attributes:
        gates: Adapter name to one [B, r, r] tensor per adapted layer; None outside a forward.
    """

    def __init__(self) -> None:
        self.gates: Mapping[str, Sequence[torch.Tensor]] | None = None

    @contextlib.contextmanager
    def set(self, gates: Mapping[str, Sequence[torch.Tensor]] | None) -> Iterator[None]:
        """Hold `gates` within the block and put back what was held before."""
        previous, self.gates = self.gates, gates
        try:
            yield
        finally:
            self.gates = previous


class CFLoraLinear(LoraLinear):  # type: ignore[misc]
    """A frozen linear layer (nn.Linear or transformers' Conv1D) with a conditioned low-rank update.

    Attributes:
        context: The tuner's gate context.
        gate_index: Adapter name to the layer's place in that adapter's gates; absent for plain
            LoRA.
    """

    other_param_names = (*LoraLinear.other_param_names, "gate_index")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, context: GateContext, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.context = context
        self.gate_index: dict[str, int] = {}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Output of the frozen layer plus every active adapter's update; x is [B, L, d_in]."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError("CFLoRA cannot mix adapters within a batch; leave adapter_names out")
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            output: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return output
        base: nn.Module = self.base_layer
        for name in names:
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            factors = Factors(A, B, self._gates(name, A.dtype), self.scaling[name])
            dropout_p = getattr(self.lora_dropout[name], "p", 0.0)
            (output,) = cflora(x, [base], [factors], dropout_p=dropout_p, training=self.training)
            base = _Computed(output)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the update into the frozen weight; refused while M depends on the sample."""
        for name in adapter_names or self.active_adapters:
            self._refuse_conditional(name)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight update s B A of a plain adapter, [d_out, d_in]."""
        self._refuse_conditional(adapter)
        delta: torch.Tensor = super().get_delta_weight(adapter)
        return delta

    def supports_lora_conversion(self, adapter_name: str = ADAPTER) -> bool:
        """Whether the adapter equals some plain LoRA."""
        return adapter_name not in self.gate_index

    def _gates(self, adapter: str, dtype: torch.dtype) -> torch.Tensor | None:
        index = self.gate_index.get(adapter)
        if index is None:
            return None
        gates = self.context.gates
        if gates is None or adapter not in gates:
            raise ConfigError(
                f"adapter '{adapter}' is conditioned on h and no gates are set; "
                "run the model inside `with model.base_model.conditioned(instance):`"
            )
        return gates[adapter][index].to(dtype)

    def _refuse_conditional(self, adapter: str) -> None:
        if adapter in self.gate_index:
            raise ConfigError(_MERGE_REFUSED.format(adapter=adapter))


_MERGE_REFUSED = (
    "adapter '{adapter}' cannot be merged: its interaction matrix M(h) differs from sample to "
    "sample, so there is no one weight to fold it into; serve it as an adapter, or train with "
    "interaction identity"
)


class _Computed(nn.Module):
    """The output so far, as the frozen layer under the next active adapter."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output, flattened like x."""
        return self.output.flatten(0, -2)


class CFLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's LoRA tuner with CFLoRA layers, the stacked gate networks and what joins the two.

    Attributes:
        context: Hands gates to the layers.
        cflora_interaction: Adapter name to its `StackedInteraction`.
    """

    prefix: str = "cflora_"
    uses_shared_state = True

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Wrap the target layers and add the adapter's gate networks."""
        if "context" not in self.__dict__:
            self.context = GateContext()
            self.cflora_interaction = nn.ModuleDict()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: CFLoraConfig = self.peft_config[adapter_name]
        if config.interaction == "identity":
            return
        layers = [
            m for m in model.modules() if isinstance(m, CFLoraLinear) and adapter_name in m.lora_A
        ]
        for index, layer in enumerate(layers):
            layer.gate_index[adapter_name] = index
        factor = layers[0].lora_A[adapter_name].weight
        with factor.device:
            gates = stacked_interaction(config.spec, len(layers), config.instance_dim)
        self.cflora_interaction[adapter_name] = gates
        self._sync_interaction(config.inference_mode)

    def conditioned(self, instance: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Context in which the model runs with the gates of these samples.

        Args:
            instance: h, [B, H]; row b belongs to sample b of the batch that is then run.
        """
        gates = {
            name: cast("StackedInteraction", self.cflora_interaction[name]).per_layer(instance)
            for name in self.active_adapters
            if name in self.cflora_interaction
        }
        return self.context.set(gates)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; their gates become trainable with them."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_interaction(inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Train or freeze adapters with their gates."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.cflora_interaction:
                self.cflora_interaction[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter with its gates."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.cflora_interaction:
            del self.cflora_interaction[adapter_name]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a mixture of factors would lose the gates."""
        raise ConfigError("CFLoRA adapters cannot be combined by weights: the gates would be lost")

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            if self.peft_config[name].conditional:
                raise ConfigError(_MERGE_REFUSED.format(adapter=name))

    def _sync_interaction(self, inference_mode: bool) -> None:
        for name, gates in self.cflora_interaction.items():
            gates.requires_grad_(name in self.active_adapters and not inference_mode)

    def _create_new_module(
        self, lora_config: CFLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise ConfigError(
                f"CFLoRA adapts linear layers; '{kwargs.get('target_name')}' is a "
                f"{type(base).__name__}: change model.target_modules"
            )
        lora_config.fan_in_fan_out = isinstance(base, Conv1D)
        return CFLoraLinear(
            target,
            adapter_name,
            self.context,
            config=lora_config,
            is_target_conv_1d_layer=isinstance(base, Conv1D),
            **kwargs,
        )


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


def _register() -> None:
    """Add CFLORA to PEFT's closed enum and register the method; does nothing the second time."""
    if "CFLORA" not in PeftType.__members__:
        member = str.__new__(PeftType, "CFLORA")
        member._name_, member._value_ = "CFLORA", "CFLORA"
        type.__setattr__(PeftType, "CFLORA", member)
        PeftType._member_names_.append("CFLORA")
        PeftType._member_map_["CFLORA"] = member
        PeftType._value2member_map_["CFLORA"] = member
    if PeftType.CFLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="cflora", config_cls=CFLoraConfig, model_cls=CFLoraModel)


_register()

"""PEFT's LoRA tuner with CFLoRA layers, the gate networks of all of them, and what joins the two.

The gates of all layers are computed together by one module that the tuner owns, so PEFT saves and
loads it with the adapter and ZeRO-3 gathers it once a step.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from rellax_ds.errors import ConfigError
from rellax_ds.model.cflora.context import ConditionedCheckpoint, Conditions, GateContext
from rellax_ds.model.cflora.layer import MERGE_REFUSED, CFLoraLinear
from rellax_ds.model.interaction import stacked_interaction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.kernels.rows import Rows
    from rellax_ds.model.cflora.config import CFLoraConfig
    from rellax_ds.model.interaction import StackedInteraction

CONTAINER = "cflora_interaction"
"""Attribute of the tuner that holds the stacked gate networks, one per adapter."""

_CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute in which transformers keeps the checkpoint function of a block."""


class CFLoraModel(LoraModel):  # type: ignore[misc]  # PEFT is untyped
    """The tuner that `get_peft_model` makes from a `CFLoraConfig`.

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
        self._condition_checkpoints(model)
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
        self.context.interactions[adapter_name] = gates
        self._sync_interaction(config.inference_mode)

    def conditioned(
        self, instance: torch.Tensor, rows: Rows | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Context in which the model runs with the gates of these samples.

        The backward pass may run inside or after it.

        Args:
            instance: h, [S, H]; row b belongs to sample b of the batch that is then run.
            rows: Which sample owns each token, where the batch is packed (`Rows.from_lengths`,
                `Rows.from_ids`); by default it is padded, [S, L]. Rows of S + 1 samples: the last
                one's tokens get M = I, plain LoRA.

        Raises:
            ConfigError: An active adapter was made for another width of h.
        """
        gates = {}
        for name in self.active_adapters:
            if name not in self.cflora_interaction:
                continue
            wanted = self.peft_config[name].instance_dim
            if wanted and instance.shape[-1] != wanted:
                raise ConfigError(
                    f"adapter '{name}' was made for an h of width {wanted}, this one has "
                    f"{instance.shape[-1]}; use the recommender it was trained with"
                )
            interaction = cast("StackedInteraction", self.cflora_interaction[name])
            plain = rows is not None and rows.samples == len(instance) + 1
            gates[name] = interaction.per_layer(instance, plain)
        return self.context.set(Conditions(gates, rows))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations of the blocks in the backward pass, with the gates they had.

        Args:
            activation_checkpointing_kwargs: Arguments of `torch.utils.checkpoint.checkpoint`;
                `use_reentrant` may be true or false (the default).
            **kwargs: Passed on to transformers.
        """
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None)
            or self.model.gradient_checkpointing_enable
        )
        enable(activation_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)
        self._condition_checkpoints(self.model)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """`activation_checkpointing_enable` by its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

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
            del self.context.interactions[adapter_name]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a mixture of factors would lose the gates."""
        raise ConfigError("CFLoRA adapters cannot be combined by weights: the gates would be lost")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter equals some plain LoRA."""
        return not self.peft_config[adapter_name].conditional

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            if self.peft_config[name].conditional:
                raise ConfigError(MERGE_REFUSED.format(adapter=name))

    def _sync_interaction(self, inference_mode: bool) -> None:
        for name, gates in self.cflora_interaction.items():
            gates.requires_grad_(name in self.active_adapters and not inference_mode)

    def _condition_checkpoints(self, model: nn.Module) -> None:
        """Wrap the checkpoint functions the blocks have by now, each once."""
        wrapped: dict[int, ConditionedCheckpoint] = {}
        for module in model.modules():
            checkpoint = module.__dict__.get(_CHECKPOINT)
            if checkpoint is None or isinstance(checkpoint, ConditionedCheckpoint):
                continue
            made = wrapped.setdefault(
                id(checkpoint), ConditionedCheckpoint(checkpoint, self.context)
            )
            setattr(module, _CHECKPOINT, made)

    def _create_new_module(
        self, lora_config: CFLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantised = hasattr(base, "in_features") and hasattr(base, "out_features")
        if not isinstance(base, (nn.Linear, Conv1D)) and not quantised:
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

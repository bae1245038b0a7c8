"""One adapted layer: a frozen linear layer of any kind and its updates gated per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from rellax_ds.errors import ConfigError
from rellax_ds.ops import Factors, cflora

if TYPE_CHECKING:
    from rellax_ds.model.cflora.context import GateContext

MERGE_REFUSED = (
    "adapter '{adapter}' cannot be merged: its interaction matrix M(h) differs from sample to "
    "sample, so there is no one weight to fold it into; serve it as an adapter, or train with "
    "interaction identity or full_static"
)


class CFLoraLinear(LoraLinear):  # type: ignore[misc]  # PEFT is untyped
    """A frozen linear layer (nn.Linear, transformers' Conv1D or a quantised one) with a conditioned
    low-rank update.

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
        """Output of the frozen layer plus every active adapter's update; x is [..., d_in]."""
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
            factors = Factors(
                self.lora_A[name].weight,
                self.lora_B[name].weight,
                self._gates(name, x),
                self.scaling[name],
            )
            dropout_p = getattr(self.lora_dropout[name], "p", 0.0)
            (output,) = cflora(
                x,
                [base],
                [factors],
                self.context.rows,
                dropout_p=dropout_p,
                training=self.training,
            )
            base = _Computed(output)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold updates into the frozen weight.

        Raises:
            ConfigError: M depends on the sample, or the weight is quantised or partitioned.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is None or not weight.is_floating_point() or hasattr(weight, "ds_id"):
            raise ConfigError(
                "cannot merge into a quantised or partitioned weight; load the base model in a "
                "float type, in one process"
            )
        for name in adapter_names or self.active_adapters:
            self._refuse_conditional(name)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight update s B M A where M is the same for every sample, shaped like the weight.

        Raises:
            ConfigError: M depends on the sample.
        """
        B = self.lora_B[adapter].weight
        wide = torch.promote_types(B.dtype, torch.float32)
        delta = B.to(wide) @ self.plain_down(adapter).to(wide) * self.scaling[adapter]
        shaped: torch.Tensor = delta.t() if self.fan_in_fan_out else delta
        return shaped.to(B.dtype)

    def plain_down(self, adapter: str) -> torch.Tensor:
        """A' = M A [r, d_in], the down factor of the plain LoRA that equals this adapter.

        Raises:
            ConfigError: M depends on the sample.
        """
        self._refuse_conditional(adapter)
        A: torch.Tensor = self.lora_A[adapter].weight
        index = self.gate_index.get(adapter)
        if index is None:
            return A
        M = self.context.matrix(adapter, index)
        wide = torch.promote_types(A.dtype, torch.float32)
        return (M.to(wide) @ A.to(wide)).to(A.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter equals some plain LoRA."""
        interaction = self.context.interactions.get(adapter_name)
        return interaction is None or interaction.input_independent

    def _gates(self, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        index = self.gate_index.get(adapter)
        if index is None:
            return None
        return self.context.gates(adapter, index, x.shape[0] if x.dim() == 3 else 1)

    def _refuse_conditional(self, adapter: str) -> None:
        if not self.supports_lora_conversion(adapter):
            raise ConfigError(MERGE_REFUSED.format(adapter=adapter))


class _Computed(nn.Module):
    """The output so far, as the frozen layer under the next active adapter."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The output, flattened like x."""
        return self.output.flatten(0, -2)

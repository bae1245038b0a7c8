"""What an adapter is: LoRA's configuration and what M(h) needs, in PEFT's `adapter_config.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from peft.tuners.lora import LoraConfig
from peft.utils import PeftType

import rellax_ds
from rellax_ds.errors import ConfigError
from rellax_ds.family import InteractionSpec

if TYPE_CHECKING:
    from rellax_ds.family import Head, Init, Kind

_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "rank_pattern",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "mica",
)
"""Variants of PEFT's LoRA that change what a layer computes, and ranks that differ by layer, which
a stack of gates cannot have."""


@dataclass
class CFLoraConfig(LoraConfig):  # type: ignore[misc]  # PEFT is untyped
    """LoRA's configuration and what M(h) needs.

    Attributes:
        interaction: The kind of M; see `rellax_ds.family`, also for the fields up to
            `interaction_scale`. `full`: one dense matrix per layer and sample; `identity`: plain
            LoRA.
        instance_dim: Width of h.
        plugin: Module to import before PEFT can load the adapter.
        plugin_version: Version of rellax_ds that wrote it.

    Raises:
        ConfigError: A field of LoRA's is set that CFLoRA does not support, the interaction fields
            contradict each other, or h is needed and has no width.
    """

    interaction: Kind = "full"
    interaction_init: Init = "identity"
    interaction_head: Head = "mlp"
    interaction_hidden: int | None = None
    interaction_factors: int | None = None
    interaction_experts: int = 4
    interaction_temperature: float = 1.0
    interaction_shared: bool = False
    interaction_scale: float = 1.0
    instance_dim: int | None = None
    plugin: str = field(default="rellax_ds")
    plugin_version: str = field(default=rellax_ds.__version__)

    def __post_init__(self) -> None:
        """Refuse what the method does not define."""
        super().__post_init__()
        self.peft_type = PeftType.CFLORA
        for name in _UNSUPPORTED:
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

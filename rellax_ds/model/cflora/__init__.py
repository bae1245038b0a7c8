"""CFLoRA as a PEFT method: a LoRA whose two factors meet through an interaction matrix M(h) of each
sample.

y = W0 x + s B M(h) A x. Importing this package registers the method `CFLORA` with PEFT (the one
extension of another library's table), after which `get_peft_model`, `save_pretrained` and
`PeftModel.from_pretrained` work as for any other method; `rellax_ds.plugin` imports it as soon as
PEFT is there.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from rellax_ds.model.cflora.adapter import (
    ADAPTER,
    SETTINGS,
    WEIGHTS,
    adapted_layers,
    adapter_tensors,
    attach,
    export_lora,
    settings_document,
    start_from,
)
from rellax_ds.model.cflora.config import CFLoraConfig
from rellax_ds.model.cflora.layer import CFLoraLinear
from rellax_ds.model.cflora.tuner import CONTAINER, CFLoraModel

__all__ = [
    "ADAPTER",
    "CONTAINER",
    "SETTINGS",
    "WEIGHTS",
    "CFLoraConfig",
    "CFLoraLinear",
    "CFLoraModel",
    "adapted_layers",
    "adapter_tensors",
    "attach",
    "export_lora",
    "settings_document",
    "start_from",
]


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

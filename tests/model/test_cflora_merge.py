"""Folding an adapter away: exact where M is the same for every sample, refused where it is not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from rellax_ds.errors import ConfigError
from rellax_ds.model.cflora import CFLoraConfig, CFLoraLinear, export_lora

if TYPE_CHECKING:
    from pathlib import Path

STATIC = ("identity", "full_static")


def adapted(family: str, interaction: str, **fields: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": FAMILIES[family]}
    config = CFLoraConfig(**settings, interaction=interaction, task_type="CAUSAL_LM", **fields)
    model = peft.get_peft_model(tiny_model(family), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(20, 60, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("interaction", STATIC)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_and_unmerge_keep_the_logits(
    family: str, interaction: str, ids: torch.Tensor
) -> None:
    model = adapted(family, interaction)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.merge_adapter(safe_merge=True)
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        after = model(input_ids=ids).logits
        alone = model.merge_and_unload()
        assert not [m for m in alone.modules() if isinstance(m, CFLoraLinear)]
        torch.testing.assert_close(alone(input_ids=ids).logits, before, rtol=0, atol=1e-4)
        bare = tiny_model(family).eval()(input_ids=ids).logits
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert (before - bare).abs().max() > 0.1


@pytest.mark.parametrize("interaction", STATIC)
def test_exported_lora_is_stock_peft_and_gives_the_same_logits(
    interaction: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = adapted("qwen2", interaction, modules_to_save=["lm_head"])
    export_lora(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert not [name for name in settings if "interaction" in name or "plugin" in name]
    loaded = peft.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path).eval()
    assert type(loaded.base_model) is peft.LoraModel
    with torch.no_grad():
        difference = loaded(input_ids=ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() <= 1e-5


def test_static_matrix_needs_no_context_and_trains_without_one(ids: torch.Tensor) -> None:
    model = adapted("llama", "full_static").train()
    free = model(input_ids=ids).logits
    with model.base_model.conditioned(torch.empty(3, 0)):
        held = model(input_ids=ids).logits
    torch.testing.assert_close(free, held, rtol=1e-5, atol=1e-5)
    free.square().mean().backward()
    gradient = model.base_model.cflora_interaction["default"].offset.grad
    assert gradient is not None
    assert gradient.abs().amax(dim=(1, 2)).min() > 0


def test_peft_conversion_takes_static_adapters_and_leaves_conditional_ones() -> None:
    static = adapted("llama", "full_static")
    layer = next(m for m in static.modules() if isinstance(m, CFLoraLinear))
    assert static.supports_lora_conversion()
    _, tensors = peft.convert_to_lora(static, rank=4)
    name = next(n for n, m in static.named_modules() if m is layer)
    A, B = (tensors[f"{name}.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(B @ A, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    conditional = adapted("llama", "full", instance_dim=5)
    assert not conditional.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(conditional, rank=4)


def test_conditional_adapter_is_neither_merged_nor_exported(tmp_path: Path) -> None:
    model = adapted("llama", "full", instance_dim=5)
    layer = next(m for m in model.modules() if isinstance(m, CFLoraLinear))
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ConfigError, match=r"cannot be merged.*from sample to sample"):
            merge()
    with pytest.raises(ConfigError, match=r"cannot be exported.*from sample to sample"):
        export_lora(model, tmp_path / "out")
    assert not layer.merged
    assert not (tmp_path / "out").exists()

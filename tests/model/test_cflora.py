"""CFLoRA as a PEFT method: equal to stock LoRA where it must be, loadable, honest about merging."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rellax_ds.errors import CheckpointError, ConfigError
from rellax_ds.model import cflora
from rellax_ds.model.cflora import CFLoraConfig
from rellax_ds.model.rellax import adapter_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.model.rellax import ReLLaX

ROOT = Path(__file__).resolve().parents[2]
INSTANCE_DIM = 5
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def attached(path: Path, family: str, cls: type, seed: int = 0, **fields: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(path)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "lora_dropout": 0.0}
    model = peft.get_peft_model(base, cls(**settings, task_type="CAUSAL_LM", **fields))
    torch.manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name.split(".base_model.")[-1] and "cflora_" not in name:
            parameter.data.normal_(std=0.3)
    return model


def scored(model: Any, ids: torch.Tensor, instance: torch.Tensor | None = None) -> torch.Tensor:
    if instance is None:
        return model(input_ids=ids).logits
    with model.base_model.conditioned(instance):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_identity_equals_stock_lora_in_output_and_gradient(
    backbones: dict[str, Path], family: str
) -> None:
    stock = attached(backbones[family], family, peft.LoraConfig)
    ours = attached(backbones[family], family, CFLoraConfig, interaction="identity")
    ids = torch.randint(20, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    outputs = []
    for model in (stock, ours):
        model.train()
        outputs.append(scored(model, ids))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    wanted = {n: p.grad for n, p in stock.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_identity_start_equals_plain_lora_exactly(backbones: dict[str, Path]) -> None:
    plain = attached(backbones["llama"], "llama", CFLoraConfig, interaction="identity").eval()
    gated = attached(backbones["llama"], "llama", CFLoraConfig, instance_dim=INSTANCE_DIM).eval()
    ids = torch.randint(20, 60, (3, 8))
    difference = scored(plain, ids) - scored(gated, ids, torch.randn(3, INSTANCE_DIM))
    assert difference.abs().max() == 0


def test_conditional_model_without_gates_refuses_to_run(backbones: dict[str, Path]) -> None:
    model = attached(backbones["llama"], "llama", CFLoraConfig, instance_dim=INSTANCE_DIM)
    with pytest.raises(ConfigError, match="no gates are set"):
        model(input_ids=torch.tensor([[21, 22]]))
    with pytest.raises(ConfigError, match="do not fit"):
        scored(model, torch.tensor([[21, 22]]), torch.randn(2, INSTANCE_DIM))


_FRESH = """
import sys
import torch
if sys.argv[2] == "plugin":
    import rellax_ds
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
case = load_file(sys.argv[3] + "/case.safetensors")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[3])
with model.eval().base_model.conditioned(case["instance"]), torch.no_grad():
    logits = model(input_ids=case["ids"]).logits
assert (logits - case["logits"]).abs().max() == 0, (logits - case["logits"]).abs().max()
"""


def test_saved_adapter_loads_in_a_fresh_process_with_equal_logits(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = backbones["llama"]
    model = attached(path, "llama", CFLoraConfig, instance_dim=INSTANCE_DIM).eval()
    with torch.no_grad():
        for parameter in model.base_model.cflora_interaction.parameters():
            parameter.add_(torch.randn_like(parameter))
    ids, instance = torch.randint(20, 60, (3, 8)), torch.randn(3, INSTANCE_DIM)
    with torch.no_grad():
        case = {"ids": ids, "instance": instance, "logits": scored(model, ids, instance)}
    model.save_pretrained(tmp_path)
    save_file(case, tmp_path / "case.safetensors")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _FRESH, str(path), plugin, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for plugin in ("plugin", "none")
    ]
    with_plugin, without = (process.communicate(timeout=200)[1] for process in processes)
    assert processes[0].returncode == 0, with_plugin
    assert processes[1].returncode != 0
    assert "CFLORA" in without


def test_documented_example_runs_as_written(
    backbones: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "cflora.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    code = example[1].replace("HuggingFaceTB/SmolLM2-135M", str(backbones["llama"]))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/cflora.md", "exec"), {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_saved_adapter_loads_through_the_meta_device(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    path = backbones["llama"]
    model = attached(path, "llama", CFLoraConfig, instance_dim=INSTANCE_DIM).eval()
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
    ids, instance = torch.randint(20, 60, (3, 8)), torch.randn(3, INSTANCE_DIM)
    assert torch.equal(scored(loaded, ids, instance), scored(model, ids, instance))


def test_peft_type_behaves_like_a_member_of_the_enum() -> None:
    member = peft.PeftType("CFLORA")
    assert member is peft.PeftType.CFLORA
    assert member in list(peft.PeftType)
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    cflora._register()
    assert list(peft.PeftType).count(member) == 1


def test_adapters_are_switched_and_deleted_with_their_gates(backbones: dict[str, Path]) -> None:
    model = attached(backbones["llama"], "llama", CFLoraConfig, instance_dim=INSTANCE_DIM)
    second = CFLoraConfig(r=2, target_modules=["q_proj"], instance_dim=INSTANCE_DIM)
    model.add_adapter("second", second)
    gates = model.base_model.cflora_interaction
    assert gates["second"].weight_in.shape[0] == 2
    assert not gates["second"].weight_in.requires_grad
    model.set_adapter("second")
    assert gates["second"].weight_in.requires_grad
    assert not gates["default"].weight_in.requires_grad
    ids, instance = torch.tensor([[21, 22]]), torch.randn(1, INSTANCE_DIM)
    scored(model, ids, instance)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert set(gates) == {"default"}
    scored(model, ids, instance)


def test_merge_folds_identity_and_refuses_conditional(backbones: dict[str, Path]) -> None:
    ids = torch.randint(20, 60, (2, 6))
    plain = attached(backbones["gpt2"], "gpt2", CFLoraConfig, interaction="identity").eval()
    before = scored(plain, ids)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=0, atol=1e-4)
    gated = attached(backbones["llama"], "llama", CFLoraConfig, instance_dim=INSTANCE_DIM)
    layer = gated.base_model.model.model.layers[0].self_attn.q_proj
    for merge in (gated.merge_and_unload, gated.merge_adapter, layer.merge):
        with pytest.raises(ConfigError, match="differs from sample to sample"):
            merge()
    assert not gated.base_model.model.model.layers[0].self_attn.q_proj.merged


def test_config_refuses_what_the_method_does_not_define() -> None:
    with pytest.raises(ConfigError, match="use_dora"):
        CFLoraConfig(use_dora=True, interaction="identity")
    with pytest.raises(ConfigError, match="instance_dim"):
        CFLoraConfig()


def test_unknown_target_module_names_the_backbones_own(build: Callable[..., ReLLaX]) -> None:
    with pytest.raises(ConfigError, match=r"'query'.*down_proj"):
        build(target_modules=("query",))


def test_start_takes_a_stock_lora_and_leaves_fresh_gates(
    build: Callable[..., ReLLaX], backbones: dict[str, Path], tmp_path: Path
) -> None:
    stock = attached(backbones["llama"], "llama", peft.LoraConfig)
    stock.save_pretrained(tmp_path)
    model = build(trained=False, rank=4, alpha=6, adapter=tmp_path, train_factors=False)
    saved = dict(stock.named_parameters())
    groups = adapter_parameters(model)
    assert len(groups["factors"]) == 8
    for name, parameter in groups["factors"].items():
        assert torch.equal(parameter, saved[name.removeprefix("llm.")])
        assert not parameter.requires_grad
    assert all(p.requires_grad for p in groups["interaction"].values())
    with pytest.raises(CheckpointError, match="alpha"):
        build(trained=False, rank=4, alpha=8, adapter=tmp_path)
    with pytest.raises(CheckpointError, match=r"shape \(4, 32\), the model needs \(3, 32\)"):
        build(trained=False, rank=3, adapter=tmp_path)

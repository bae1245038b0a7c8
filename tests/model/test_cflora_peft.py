"""The PEFT method inside whole models: what PEFT and transformers do with it, and it with them."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import nn

from rellax_ds import ops
from rellax_ds.errors import ConfigError
from rellax_ds.kernels.rows import Rows
from rellax_ds.model.cflora import CFLoraConfig, CFLoraLinear

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTH = 5


def adapted(family: str, adapter: str = "default", **fields: Any) -> Any:
    """A model with random factors and gates, in training mode."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": FAMILIES[family],
        "instance_dim": WIDTH,
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(tiny_model(family), CFLoraConfig(**settings | fields), adapter)
    randomise(model)
    return model.train()


def randomise(model: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def given(samples: int = 3, length: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 60, (samples, length), generator=generator)
    return ids, torch.randn(samples, WIDTH, generator=generator)


def run(model: Any, ids: torch.Tensor, h: torch.Tensor, **fields: Any) -> torch.Tensor:
    with model.base_model.conditioned(h, fields.pop("rows", None)):
        return model(input_ids=ids, **fields).logits


def gradients(model: Any, backward: Callable[[], None]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_computes_what_the_formula_says(family: str) -> None:
    model = adapted(family)
    ids, h = given()
    found = run(model, ids, h)
    gates = model.base_model.cflora_interaction["default"](h)
    layers = [m for m in model.modules() if isinstance(m, CFLoraLinear)]
    assert len(layers) == 2 * (3 if family == "gpt2" else len(FAMILIES[family])) + (
        2 if family == "gpt2" else 0
    )
    for b in range(len(ids)):
        plain = copy.deepcopy(model.base_model.model)
        for layer in [m for m in plain.modules() if isinstance(m, CFLoraLinear)]:
            M = gates[layer.gate_index["default"], b].t()
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            update = layer.scaling["default"] * B @ M @ A
            weight = layer.base_layer.weight
            weight.data += update.t() if layer.fan_in_fan_out else update
            layer.lora_A = nn.ModuleDict()
        wanted = plain(input_ids=ids[b : b + 1]).logits[0]
        torch.testing.assert_close(found[b], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_give_the_same_bits_with_dropout(family: str, reentrant: bool) -> None:
    model = adapted(family, lora_dropout=0.3)
    ids, h = given()

    def backward() -> None:
        torch.manual_seed(7)
        loss = run(model, ids, h).square().mean()
        loss.backward()  # after the gates were taken away again

    wanted = gradients(model, backward)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, CFLoraLinear))
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, backward)
    assert len(calls) == 2, "nothing was recomputed"
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_checkpointing_enabled_before_the_adapter_or_by_the_new_name_keeps_the_gates() -> None:
    base = tiny_model("llama")
    base.activation_checkpointing_enable({"use_reentrant": False})
    settings = {"target_modules": ["q_proj"], "instance_dim": WIDTH, "task_type": "CAUSAL_LM"}
    before = peft.get_peft_model(base, CFLoraConfig(**settings)).train()
    after = adapted("llama")
    after.activation_checkpointing_enable()
    for model in (before, after):
        run(model, *given()).sum().backward()
        assert model.base_model.cflora_interaction["default"].bias_out.grad is not None


def test_packed_sequence_equals_padded_batch() -> None:
    model = adapted("llama", lora_dropout=0.0)
    ids, h = given(3, 6)
    lengths = [6, 2, 4]
    packed = torch.cat([ids[b, :n] for b, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    owners = torch.cat([torch.full((n,), b) for b, n in enumerate(lengths)])
    visible = (owners[:, None] == owners[None]) & torch.tril(torch.ones(12, 12)).bool()
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~visible, float("-inf"))
    found = run(
        model,
        packed,
        h,
        rows=Rows.from_lengths(lengths),
        position_ids=positions,
        attention_mask=mask,
    )[0]
    padded = run(model, ids, h)
    wanted = torch.cat([padded[b, :n] for b, n in enumerate(lengths)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="rows describe 12 tokens"):
        run(model, ids, h, rows=Rows.from_lengths(lengths))


def test_compiled_model_equals_the_model_and_breaks_no_graph() -> None:
    model = adapted("llama")
    ids, h = given()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)

    def eager() -> None:
        run(model, ids, h).square().mean().backward()

    def graph() -> None:
        with model.base_model.conditioned(h):
            compiled(input_ids=ids).logits.square().mean().backward()

    wanted, found = gradients(model, eager), gradients(model, graph)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_16_bits_and_gives_gradients_in_the_adapters_type() -> None:
    model = adapted("llama")
    ids, h = given()
    wanted = run(model, ids, h)
    layer = next(m for m in model.modules() if isinstance(m, CFLoraLinear))
    types = []
    layer.register_forward_hook(lambda m, a, y: types.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, ids, h)
    found.float().square().mean().backward()
    assert types == [torch.bfloat16]
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)


class Int8Linear(nn.Module):
    """Weight-only quantisation: an int8 weight and a scale per row, as 8-bit bases hold theirs."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        weight = (layer.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).t()


def test_quantised_base_is_called_normally_and_trains_like_its_float_copy() -> None:
    results = []
    for quantised in (True, False):
        base = tiny_model("llama")
        for block in base.model.layers:
            held = Int8Linear(block.self_attn.q_proj)
            block.self_attn.q_proj = held
            if not quantised:
                block.self_attn.q_proj = nn.Linear(32, 32, bias=False)
                block.self_attn.q_proj.weight.data = held.weight * held.scale
        config = CFLoraConfig(target_modules=["q_proj", "v_proj"], instance_dim=WIDTH)
        torch.manual_seed(2)
        model = peft.get_peft_model(base, config)
        randomise(model)
        found = gradients(model, lambda m=model: run(m, *given()).square().mean().backward())
        results.append(found)
        if quantised:
            with (
                ops.using("cpu"),
                pytest.raises(ops.KernelUnavailableError, match="must be called"),
            ):
                run(model, *given())
            identity = CFLoraConfig(target_modules=["q_proj"], interaction="identity")
            model.add_adapter("plain", identity)
            model.set_adapter("plain")
            with pytest.raises(ConfigError, match="quantised"):
                model.merge_adapter()
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[1].items():
        torch.testing.assert_close(results[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_two_active_adapters_add_up_in_output_and_gradient() -> None:
    model = adapted("llama", target_modules=["q_proj", "v_proj"])
    second = {"r": 2, "target_modules": ["q_proj", "v_proj"], "instance_dim": WIDTH}
    model.add_adapter("second", CFLoraConfig(**second))
    randomise(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    layer = next(m for m in model.modules() if isinstance(m, CFLoraLinear))
    _, h = given()
    x = torch.randn(3, 8, 32, requires_grad=True)
    names = ("default", "second")
    factors = {n: (layer.lora_A[n].weight, layer.lora_B[n].weight) for n in names}
    gates = {n: model.base_model.cflora_interaction[n] for n in names}
    inputs = [x, *(f for pair in factors.values() for f in pair)]
    inputs += [gates[n].weight_out for n in names]
    weights = torch.randn(3, 8, 32)
    with model.base_model.conditioned(h):
        y = layer(x)
    found = torch.autograd.grad((y * weights).sum(), inputs)
    wanted_y = layer.base_layer(x)
    for name, (A, B) in factors.items():
        G = gates[name](h)[layer.gate_index[name]]
        wanted_y = wanted_y + layer.scaling[name] * torch.bmm(x @ A.t(), G) @ B.t()
    wanted = torch.autograd.grad((wanted_y * weights).sum(), inputs)
    torch.testing.assert_close(y, wanted_y, rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_disabled_adapters_give_the_bare_model_and_need_no_gates() -> None:
    model = adapted("llama").eval()
    ids, h = given()
    with model.disable_adapter(), torch.no_grad():
        bare = model(input_ids=ids).logits
    assert torch.equal(bare, tiny_model("llama").eval()(input_ids=ids).logits)
    assert not torch.equal(run(model, ids, h), bare)


def test_modules_to_save_and_a_second_adapter_are_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted("qwen2", modules_to_save=["lm_head"]).eval()
    model.add_adapter("second", CFLoraConfig(r=2, target_modules=["q_proj"], instance_dim=WIDTH))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    randomise(model, seed=5)
    ids, h = given()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path).eval()
    loaded.load_adapter(tmp_path / "second", "second")
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(run(loaded, ids, h), run(model, ids, h)), adapter
    model.set_adapter("default")
    assert not torch.equal(run(loaded, ids, h), run(model, ids, h))


def test_mixed_batches_and_wrong_h_are_refused() -> None:
    model = adapted("llama").eval()
    ids, h = given()
    with pytest.raises(ConfigError, match="cannot mix adapters"):
        run(model, ids, h, adapter_names=["default"] * 3)
    with pytest.raises(ConfigError, match=f"h of width {WIDTH}, this one has 4"):
        run(model, ids, h[:, :4])
    with pytest.raises(ConfigError, match="target_parameters"):
        CFLoraConfig(interaction="identity", target_parameters=["q_proj.weight"])


def test_generation_uses_the_gates_of_each_sample() -> None:
    model = adapted("llama").eval()
    ids, h = given(2)
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "pad_token_id": 0}
    with model.base_model.conditioned(h):
        both = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            **options,
        )
    for b in range(2):
        with model.base_model.conditioned(h[b : b + 1]):
            one = model.generate(
                input_ids=ids[b : b + 1],
                attention_mask=torch.ones_like(ids[:1]),
                return_dict_in_generate=True,
                **options,
            )
        assert torch.equal(one.sequences[0], both.sequences[b])
        torch.testing.assert_close(one.scores[-1][0], both.scores[-1][b], rtol=1e-4, atol=1e-4)


def test_gate_only_layer_saves_a_hundredth_of_what_peft_saves() -> None:
    from peft.tuners.lora import Linear as LoraLinear

    def saved(layer: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> int:
        known = {p.untyped_storage()._cdata for p in layer.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                found[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = call(torch.randn(4, 64, 2048, requires_grad=True))
        assert kept.requires_grad
        return sum(found.values())

    base = nn.Sequential(nn.Linear(2048, 256, bias=False)).requires_grad_(False)
    settings = {"r": 8, "target_modules": ["0"], "lora_dropout": 0.05}
    plain = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings)).train()
    assert isinstance(plain.base_model.model[0], LoraLinear)
    ours = peft.get_peft_model(base, CFLoraConfig(instance_dim=WIDTH, **settings)).train()
    for factor in (ours.base_model.model[0].lora_A, ours.base_model.model[0].lora_B):
        factor.requires_grad_(False)
    gates = ours.base_model.conditioned(torch.randn(4, WIDTH))
    with gates:
        found = saved(ours, ours)
    assert 0 < found <= saved(plain, plain) / 100


_HELP = """
import sys
import rellax_ds
assert "peft" not in sys.modules and "torch" not in sys.modules
import peft
assert "CFLORA" in peft.PeftType.__members__
import rellax_ds.model.cflora
assert peft.__spec__.loader.__class__.__module__.startswith(("importlib", "_frozen"))
assert peft.get_peft_config({"peft_type": "CFLORA", "task_type": None, "instance_dim": 3}).r == 8
"""


def test_importing_the_package_first_is_cheap_and_registers_when_peft_comes() -> None:
    job = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, timeout=200)
    assert job.returncode == 0, job.stderr

"""Every kind of interaction inside a real model: start, saved form, refusals, ZeRO-3."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rellax_ds.errors import CheckpointError
from rellax_ds.model import adapter_io, cflora
from rellax_ds.model.cflora import CFLoraConfig
from rellax_ds.model.rellax import adapter_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.batch import Batch
    from rellax_ds.model.rellax import ReLLaX

RANK = 4

KINDS: dict[str, dict[str, Any]] = {
    "scalar": {},
    "diag": {},
    "block": {"interaction_experts": 2},
    "block_shared": {
        "interaction": "block",
        "interaction_experts": 4,
        "interaction_shared": True,
    },
    "block_full": {"interaction_experts": 2},
    "full": {},
    "full_factorised": {"interaction": "full", "interaction_head": "factorised"},
    "full_static": {},
    "moe": {"interaction_experts": 2, "interaction_temperature": 5.0},
    "rec_sum": {"interaction_experts": 2},
    "rec_prod": {"interaction_experts": 2},
}
AT_IDENTITY = [k for k in KINDS if k not in ("moe", "rec_sum", "rec_prod")]


def fields_of(kind: str) -> dict[str, Any]:
    return {"interaction": kind, "rank": RANK, "alpha": 6.0} | KINDS.get(kind, {})


def scores(model: ReLLaX, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch.tensors())[1]


@pytest.fixture
def plain_adapter(build: Callable[..., ReLLaX], tmp_path: Path) -> Path:
    """A trained plain LoRA."""
    model = build(**fields_of("identity"))
    adapter_io.save(model, tmp_path / "plain")
    return tmp_path / "plain"


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(9, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


def test_identity_equals_stock_lora_in_float64() -> None:
    results = []
    for cls in (peft.LoraConfig, CFLoraConfig):
        torch.manual_seed(0)
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": 6, "target_modules": ["projection"]}
        if cls is CFLoraConfig:
            settings["interaction"] = "identity"
        base = OneLayer().double()
        model = peft.get_peft_model(base, cls(**settings), autocast_adapter_dtype=False).double()
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
        y = model(x)
        y.backward(torch.randn_like(y))
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "x": x.grad} | gradients)
    assert len(results[0]) == 4
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", AT_IDENTITY)
def test_start_scores_equal_the_plain_lora_it_came_from_exactly(
    build: Callable[..., ReLLaX], batch: Batch, plain_adapter: Path, kind: str
) -> None:
    fields = {"trained": False, "adapter": plain_adapter, "spa": False}
    plain = build(**fields | fields_of("identity"))
    gated = build(**fields | fields_of(kind))
    assert adapter_parameters(gated)["interaction"]
    assert (scores(plain, batch) - scores(gated, batch)).abs().max() == 0


@pytest.mark.parametrize("kind", ["moe", "rec_sum"])
def test_start_of_n_experts_is_plain_lora_at_an_nth_of_its_scale(
    build: Callable[..., ReLLaX], batch: Batch, kind: str
) -> None:
    fields: dict[str, Any] = {"trained": False, "spa": False, "train_factors": True}
    mixture = build(**fields | fields_of(kind) | {"alpha": 12.0})
    plain = build(**fields | fields_of("identity"))
    wanted = adapter_parameters(plain)["factors"]
    with torch.no_grad():
        for name, factor in adapter_parameters(mixture)["factors"].items():
            wanted[name].copy_(factor.normal_(std=0.3))
    torch.testing.assert_close(scores(mixture, batch), scores(plain, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_of_every_kind_scores_alike_when_loaded(
    build: Callable[..., ReLLaX],
    backbones: dict[str, Path],
    batch: Batch,
    tmp_path: Path,
    kind: str,
) -> None:
    model = build(**fields_of(kind))
    adapter_io.save(model, tmp_path / "adapter")
    loaded = adapter_io.load(tmp_path / "adapter", str(backbones["llama"]))
    assert torch.equal(scores(loaded, batch), scores(model, batch))
    start = build(**fields_of(kind), trained=False)
    assert not torch.equal(scores(start, batch), scores(model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_gate_only_training_from_zero_factors_is_refused_for_every_kind(
    build: Callable[..., ReLLaX], kind: str
) -> None:
    with pytest.raises(CheckpointError, match="4 of 4 frozen B factors are all zero"):
        build(**fields_of(kind), trained=False, train_factors=False)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_alone_train_on_a_trained_lora(
    build: Callable[..., ReLLaX], batch: Batch, plain_adapter: Path, kind: str
) -> None:
    model = build(**fields_of(kind), trained=False, adapter=plain_adapter, train_factors=False)
    groups = adapter_parameters(model)
    loss, _ = model.train()(**batch.tensors())
    loss.backward()
    assert all(p.grad is None for p in groups["factors"].values())
    last = [p for n, p in groups["interaction"].items() if n.endswith(("weight_out", "offset"))]
    assert len(last) == 1
    assert last[0].grad.abs().max() > 0


def test_start_from_gates_of_another_kind_is_refused(
    build: Callable[..., ReLLaX], tmp_path: Path
) -> None:
    adapter_io.save(build(**fields_of("rec_sum")), tmp_path)
    same = build(**fields_of("rec_sum"), trained=False, adapter=tmp_path)
    assert adapter_parameters(same)["interaction"]
    with pytest.raises(CheckpointError, match=r"compute rec_sum.*recipe wants rec_prod"):
        build(**fields_of("rec_prod"), trained=False, adapter=tmp_path)
    for kind in ("full_static", "scalar"):
        with pytest.raises(CheckpointError, match=f"compute rec_sum.*recipe wants {kind}"):
            build(**fields_of(kind), trained=False, adapter=tmp_path)
    assert build(**fields_of("identity"), trained=False, adapter=tmp_path)
    warmer = fields_of("rec_sum") | {"interaction_temperature": 2.0}
    with pytest.raises(CheckpointError, match=r"temperature 1, the .* wants .*temperature 2"):
        build(**warmer, trained=False, adapter=tmp_path)
    adapter_io.save(build(**fields_of("diag")), tmp_path / "diag")
    stronger = fields_of("diag") | {"interaction_scale": 2.0}
    with pytest.raises(CheckpointError, match=r"wants .*scale 2"):
        build(**stronger, trained=False, adapter=tmp_path / "diag")


def test_adapter_config_without_the_newer_fields_still_loads(
    build: Callable[..., ReLLaX], backbones: dict[str, Path], batch: Batch, tmp_path: Path
) -> None:
    model = build()
    adapter_io.save(model, tmp_path)
    newer = {
        f"interaction_{n}" for n in ("head", "factors", "experts", "temperature", "shared", "scale")
    }
    for name in (cflora.SETTINGS, adapter_io.META):
        document = json.loads((tmp_path / name).read_text())
        place = document if name == cflora.SETTINGS else document["model"]
        for key in newer:
            del place[key]
        (tmp_path / name).write_text(json.dumps(document))
    loaded = adapter_io.load(tmp_path, str(backbones["llama"]))
    assert torch.equal(scores(loaded, batch), scores(model, batch))
    again = build(trained=False, adapter=tmp_path)
    assert torch.equal(scores(again, batch), scores(model.eval(), batch))


_JOB = """
import json, os, sys
from pathlib import Path
from rellax_ds import runtime
runtime.prepare_engine(cuda=False)
import deepspeed, torch
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig
from rellax_ds.config import ModelConfig
from rellax_ds.errors import CheckpointError
from rellax_ds.model.rellax import _freeze_factors, adapter_parameters, assemble

folder = Path(sys.argv[1])
batch = load_file(folder / "batch.safetensors")
zero3 = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
         "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
deepspeed.init_distributed(dist_backend="gloo")
if "MASTER_PORT" in os.environ:
    torch.distributed.barrier()
    runtime.forget_shared_memory()

def build(fields):
    torch.manual_seed(0)
    answers = {"yes": 11, "no": 12}
    return assemble(str(folder / "backbone"), ModelConfig(**fields), answers, 6, 5).eval()

for fields in json.loads((folder / "cases.json").read_text()):
    plain = build(fields)
    alive = HfDeepSpeedConfig(zero3)
    model = build(fields)
    for each in (plain, model):
        generator = torch.Generator().manual_seed(1)
        for group in ("factors", "interaction"):
            for name, parameter in adapter_parameters(each)[group].items():
                if ".lora_B." not in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data.add_(noise, alpha=0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero3)
    engine.eval()
    assert all(p.numel() == 0 for p in model.parameters())
    try:
        _freeze_factors(model)
    except CheckpointError as error:
        assert "4 of 4 frozen B factors are all zero" in str(error), error
    else:
        raise AssertionError("frozen B = 0 was accepted")
    for each in (plain, model):
        generator = torch.Generator().manual_seed(2)
        for name, parameter in adapter_parameters(each)["factors"].items():
            if ".lora_B." in name:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.data.normal_(std=0.3, generator=generator)
    _freeze_factors(model)
    with torch.no_grad():
        torch.testing.assert_close(engine(**batch)[1], plain(**batch)[1], rtol=0, atol=1e-5)
    engine.destroy()
    del alive
(folder / "done").touch()
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_zero3_scores_like_plain_torch_and_refuses_frozen_zero_factors(
    backbones: dict[str, Path], batch: Batch, tmp_path: Path
) -> None:
    (tmp_path / "backbone").symlink_to(backbones["llama"])
    target = {"target_modules": ["q_proj", "v_proj"], "dropout": 0.0, "spa": False}
    kinds = ("block_shared", "block_full", "full_factorised", "full_static", "rec_prod")
    (tmp_path / "cases.json").write_text(json.dumps([fields_of(kind) | target for kind in kinds]))
    save_file(batch.tensors(), tmp_path / "batch.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    job = subprocess.run(
        [sys.executable, "-c", _JOB, str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (tmp_path / "done").exists(), job.stdout[-2000:] + job.stderr[-3000:]

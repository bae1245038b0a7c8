"""What a step record says about speed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from rellax_ds.config import ModelConfig
from rellax_ds.model.rellax import build_rellax, parameter_counts
from rellax_ds.training.throughput import FIELDS, ModelCost, Throughput, peak_flops

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rellax_ds.model.rellax import ReLLaX

LENGTH = 16


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> ReLLaX:
    return build_rellax(str(tiny_llama), ModelConfig(rank=3), {"yes": 11, "no": 12}, 6, 5)


def test_cost_of_a_frozen_body_is_what_torch_counts(model: ReLLaX, tiny_llama: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").model
    embeddings = torch.randn(1, LENGTH, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        llama.requires_grad_(False)(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    cost = ModelCost.of(model)
    (factors,) = [count for count in parameter_counts(model) if count.group == "factors"]
    norms = sum(p.numel() for p in llama.parameters() if p.dim() == 1)
    body = cost.per_token - 6 * factors.trained - 4 * norms
    whole = body * LENGTH + cost.per_pair * LENGTH**2  # eager attention computes masked pairs too
    assert whole == counter.get_total_flops()


def test_step_is_described_over_all_ranks_and_mfu_of_a_cpu_is_unknown(model: ReLLaX) -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    throughput = Throughput(model, torch.device("cpu"), world_size=2)
    throughput.start()
    for _ in throughput.batches(slow()):
        time.sleep(0.01)
    assert throughput.waited >= 0.06
    found = throughput.describe(samples=8, tokens=400.0, waited=2 * throughput.waited)
    assert tuple(found) == FIELDS
    assert found["mfu"] is None
    assert found["data_wait_seconds"] == pytest.approx(throughput.waited)
    assert 0 < found["data_wait_share"] <= 1
    assert found["tokens_per_second"] == pytest.approx(50 * found["samples_per_second"])
    assert found["samples_per_second"] < 8 / 0.09
    assert found["peak_memory_bytes"] > 2**20


def test_mfu_counts_every_device(model: ReLLaX, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(model, torch.device("cpu"), world_size=4)
    cost = ModelCost.of(model)
    monkeypatch.setattr(throughput, "_peak", 4 * 1e9)
    monkeypatch.setattr(time, "monotonic", lambda: 2.0)
    assert throughput.describe(2, 40.0, 0.0)["mfu"] == pytest.approx(
        (cost.per_token * 40 + cost.per_pair * 2 * 20 * 21 / 2) / 2.0 / 4e9
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("", None),
    ],
)
def test_peak_is_known_by_whole_words_of_the_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak

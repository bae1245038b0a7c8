"""A whole training step of a random Llama: plain LoRA by PEFT against CFLoRA, same data.

The backbone is random, because only its shape matters to the time. All arms train q and v with rank
8 by AdamW on the same tokens; the loss of the last step shows that they trained.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rellax_ds.model.cflora import CFLoraConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu_suite.suite import Section

INSTANCE_DIM = 64
GPU = {
    "config": {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "batch": (4, 2048),
    "steps": 8,
}
CPU = {
    "config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 64,
    },
    "batch": (2, 16),
    "steps": 3,
}
WARM_UP = 2


def measure(section: Section, device: str) -> None:
    """Time the step of every arm."""
    setting: dict[str, Any] = GPU if device == "cuda" else CPU
    samples, length = setting["batch"]
    table = section.table(
        f"Llama of {setting['config']}, bf16, {samples} samples of {length} tokens, q and v, rank "
        "8, dropout 0.05, AdamW; median milliseconds of a step after warm-up.",
        ["arm", "ms", "tokens/s", "peak GiB", "loss"],
    )
    arms: dict[str, Callable[[Any], Any]] = {
        "PEFT, default (fp32 adapters)": lambda base: peft.get_peft_model(base, plain()),
        "PEFT, bf16 adapters": lambda base: peft.get_peft_model(
            base, plain(), autocast_adapter_dtype=False
        ),
        "CFLoRA": lambda base: peft.get_peft_model(base, conditioned()),
    }
    for name, attach in arms.items():
        with section.part(name):
            table.rows.append([name, *run(attach, setting, device)])
        gc.collect()


def plain() -> peft.LoraConfig:
    """Plain LoRA at the published setting."""
    return peft.LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]
    )


def conditioned() -> CFLoraConfig:
    """CFLoRA at the same setting."""
    return CFLoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        instance_dim=INSTANCE_DIM,
    )


def run(
    attach: Callable[[Any], Any], setting: dict[str, Any], device: str
) -> tuple[float, float, float | None, float]:
    """Milliseconds, tokens a second, peak GiB and last loss of one arm."""
    torch.manual_seed(0)
    config = LlamaConfig(**setting["config"], dtype=torch.bfloat16)
    model = attach(LlamaForCausalLM(config).to(device, torch.bfloat16)).to(device).train()
    samples, length = setting["batch"]
    ids = torch.randint(0, config.vocab_size, (samples, length), device=device)
    instance = torch.randn(samples, INSTANCE_DIM, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, loss = [], 0.0
    for _ in range(WARM_UP + setting["steps"]):
        started = time.perf_counter()
        loss = step(model, ids, instance, optimiser)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return seconds * 1e3, samples * length / seconds, peak, loss


def step(model: Any, ids: torch.Tensor, instance: torch.Tensor, optimiser: Any) -> float:
    """One optimiser step; reading its loss waits for the device."""
    if hasattr(model.base_model, "conditioned"):
        with model.base_model.conditioned(instance):
            loss = model(input_ids=ids, labels=ids).loss
    else:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())

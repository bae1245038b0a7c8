"""What the operator keeps for backward, held to a count by hand; a regression here is memory."""

from __future__ import annotations

import pytest
import torch

from benchmarks.saved import SAMPLES, our_saved, peft_saved, saved_bytes

TOKENS, RANK, P = 512, 8, 0.05
GATES, SEED = SAMPLES * RANK * RANK * 4, 8
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def test_saved_bytes_counts_a_storage_once_a_view_whole_and_parameters_never() -> None:
    weight = torch.randn(3, requires_grad=True)
    x = torch.randn(10, 3, requires_grad=True)
    assert saved_bytes(lambda: x[:2] * weight, [weight]) == 10 * 3 * 4
    assert saved_bytes(lambda: (x * weight) + x.exp(), [weight]) == 2 * 10 * 3 * 4


@TYPES
def test_gate_only_saves_the_rank_r_product_gates_and_seed_alone(dtype: torch.dtype) -> None:
    for width in (64, 576):
        saved = our_saved(TOKENS, width, RANK, dtype, P, trains_factors=False)
        assert saved <= TOKENS * RANK * dtype.itemsize + GATES + SEED


@TYPES
def test_trained_factors_save_x_once_and_rank_r_tensors(dtype: torch.dtype) -> None:
    width = 256
    saved = our_saved(TOKENS, width, RANK, dtype, P, trains_factors=True)
    mask = TOKENS * width // 8
    limit = TOKENS * (width + 2 * RANK) * dtype.itemsize + mask + GATES + SEED
    assert TOKENS * width * dtype.itemsize <= saved <= limit


def test_gate_only_saves_a_hundredth_of_peft_at_the_width_of_an_llm() -> None:
    bf16 = torch.bfloat16
    ours = our_saved(TOKENS, 4096, RANK, bf16, P, trains_factors=False)
    assert peft_saved(TOKENS, 4096, RANK, bf16, bf16, P) >= 100 * ours > 0

"""The door to the operator: what it offers, what it refuses, and that the choice is made once."""

from __future__ import annotations

import pytest
import torch

from rellax_ds import ops
from rellax_ds.errors import ConfigError, KernelUnavailableError


def test_ops_asked_for_an_absent_path_raises_and_keeps_the_choice() -> None:
    before = ops.chosen()
    with pytest.raises(KernelUnavailableError, match=r"'triton'.*available: reference"):
        ops.use("triton")
    with pytest.raises(ConfigError, match="cuda"):
        ops.use("cuda")
    assert ops.chosen() == before


def test_ops_gates_of_another_batch_are_refused() -> None:
    x, A, B = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(5, 2)
    with pytest.raises(ConfigError, match=r"\(3, 2, 2\) do not fit"):
        ops.cflora_delta(x, A, B, torch.randn(3, 2, 2), 1.0)
    with pytest.raises(ConfigError, match="do not fit"):
        ops.cflora_delta(x[0], A, B, torch.randn(3, 2, 2), 1.0)

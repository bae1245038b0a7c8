"""The byte ledger: its counters against what must be read and written by hand count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ledger, passes

JOB = Path(__file__).with_name("traffic_job.py")
TOKENS, WIDTH = 64, 32


def pairs(operators: list[passes.Operator]) -> list[tuple[str, int, int]]:
    return [(each.name, each.read, each.written) for each in operators]


def test_traffic_views_and_allocations_are_free_and_in_place_reads_its_target() -> None:
    x = torch.empty(8, 4, device="meta")
    with passes.Traffic() as traffic:
        y = torch.empty_like(x).t()[:2]
        x.add_(1.0)
        torch.mm(y, x)
    assert pairs(traffic.operators) == [("add_", 128, 128), ("mm", 64 + 128, 32)]


def test_count_bare_linear_has_no_extra_passes() -> None:
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False, device="meta", dtype=torch.bfloat16)
    forward, backward = passes.count(layer.requires_grad_(False), TOKENS, WIDTH)
    assert passes.extra_passes(forward + backward, TOKENS, WIDTH) == 0


@pytest.mark.parametrize(
    ("dtype", "p", "expected"),
    [(torch.bfloat16, 0.05, 21.04), (torch.float32, 0.05, 52.07), (torch.bfloat16, 0.0, 16.04)],
)
def test_peft_layer_at_true_size_costs_what_its_formula_says(
    dtype: torch.dtype, p: float, expected: float
) -> None:
    assert passes.peft_passes(4096, dtype, p) == pytest.approx(expected, abs=0.006)


def test_predicted_time_is_base_gemm_plus_passes() -> None:
    assert ledger.predicted(0, 4096) * 1e6 == pytest.approx(785, abs=1)
    added = ledger.predicted(21, 4096) - ledger.predicted(0, 4096)
    assert added == pytest.approx(21 * 8192 * 4096 * 2 / (0.9 * 3.35e12))


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(JOB)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(JOB.parents[2])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernel_traffic_counts_distinct_bytes_and_requested_bytes(counted: dict) -> None:
    sums, outer = (launch["accesses"] for launch in counted["small"])
    assert sums["x"].pop("shape") == [40, 37]
    for access in [*sums.values(), *outer.values()]:
        access.pop("shape", None)
    rows, columns = 40, 37
    whole = rows * columns * 4
    assert sums["x"] == {"size": whole, "read": whole, "written": 0, "requested": whole}
    assert sums["out"] == {"size": 160, "read": 0, "written": 160, "requested": 160}
    assert sums["total"] == {"size": 4, "read": 4, "written": 4, "requested": rows * 8}
    assert outer["a"] == {"size": 160, "read": 160, "written": 0, "requested": 3 * 160}
    assert outer["b"] == {"size": 148, "read": 148, "written": 0, "requested": 3 * 148}
    assert outer["out"] == {"size": whole, "read": 0, "written": whole, "requested": whole}


def test_kernel_traffic_charges_a_shape_that_was_never_executed(counted: dict) -> None:
    assert counted["large"] == {
        "row_sums.x": [8192 * 4096 * 4, 0],
        "row_sums.out": [0, 8192 * 4],
        "row_sums.total": [4, 4],
        "outer_tiles.a": [8192 * 4, 0],
        "outer_tiles.b": [4096 * 4, 0],
        "outer_tiles.out": [0, 8192 * 4096 * 4],
    }


def test_kernel_passes_of_torch_products_equal_the_count_by_hand() -> None:
    pytest.importorskip("triton")
    from benchmarks import kernel_passes
    from rellax_ds.kernels.composable import ComposablePath

    tokens, width, path = 8192, 4096, ComposablePath()
    normal = kernel_passes.Arm("normal", "torch", dense=False, dropout_p=0.0)
    assert kernel_passes.learn(normal, path, 64, 32) == {}
    found = kernel_passes.measure(normal, path, {}, tokens, width)
    by_hand = 1 + 2 + 2 + 1 + 1 + 3  # x, y in place; dy twice, x, dx written, autograd's sum
    assert by_hand <= found.extra <= by_hand + 0.2  # and rank-r tensors
    gates = kernel_passes.Arm("gates", "torch", trains_factors=False, dropout_p=0.0)
    found = kernel_passes.measure(gates, path, {}, tokens, width)
    by_hand = 1 + 2 + 1 + 2  # x, y in place; dy, dx in place
    assert by_hand <= found.extra <= by_hand + 0.2


def test_kernel_passes_of_our_kernels_read_each_large_tensor_as_often_as_designed() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("rellax_ds.kernels.launch")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_passes", "fused", "fused, gate-only"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(JOB.parents[2]), "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    fused, gates = json.loads(done.stdout)
    assert fused["disagreement"] == gates["disagreement"] == []
    assert fused["large"] == 3 + 3 / 16  # x, dy, x again; mask written, read twice
    assert gates["large"] == 2  # x, dy; the mask is drawn again
    assert fused["large"] < fused["passes"]["4096"] < 4
    assert gates["large"] < gates["passes"]["4096"] < 2.5


def test_kernel_passes_disagreement_names_the_argument_that_depends_on_the_width() -> None:
    pytest.importorskip("triton")
    from benchmarks import kernel_passes

    one = {("f", "x"): (1.0, 0.0), ("f", "y"): (0.0, 1.0)}
    assert kernel_passes.disagreement(one, dict(one)) == []
    (named,) = kernel_passes.disagreement(one, {**one, ("f", "y"): (0.0, 0.5)})
    assert named.startswith("f(y)")


def test_kernel_passes_of_a_path_with_a_kernel_equal_the_count_by_hand(counted: dict) -> None:
    assert counted["disagreement"] == []
    found = counted["found"]
    assert found["items"]["project(x)"] == [1.0, 0.0]
    assert found["items"]["project(out)"] == [0.0, 16 / 4096]
    assert found["large"] == 1.0 - 4  # the linear itself runs outside of kernels here
    by_hand = 1 + 2 + 2 + 1 + 2  # x, y in place; dy twice, x, dx in place
    assert by_hand <= found["extra"] <= by_hand + 0.2  # and rank-r tensors

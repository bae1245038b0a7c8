"""The Triton paths in the interpreter: every kernel, layout, rank and mask against the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from operator_cases import NAMES, PADDED, RAGGED, TWO_RUNS, assert_close, case, dropout

pytest.importorskip("triton")

import triton

from rellax_ds.errors import KernelUnavailableError
from rellax_ds.kernels import configs, launch, philox
from rellax_ds.kernels.rows import Rows

LAYOUTS = {"padded": PADDED, "ragged": RAGGED, "two-runs": TWO_RUNS}
PATHS = ("triton", "cublas")

assert launch.interpreted(), "tests/conftest.py asks Triton to interpret"
if launch.unavailable():
    pytest.skip(launch.unavailable(), allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("path", PATHS)
def test_paths_equal_the_oracle(path: str, layout: str, p: float, dtype: torch.dtype) -> None:
    assert_close(case(LAYOUTS[layout], p=p), path, dtype)


@pytest.mark.parametrize("rank", [1, 4, 8, 12, 16, 20, 32, 48, 64])
def test_any_rank(rank: int) -> None:
    assert_close(case(TWO_RUNS, d_in=40, ranks=(rank,), p=0.2), "triton", torch.float32)


@pytest.mark.parametrize(("d_in", "d_out"), [(8, 1), (31, 123), (123, 31), (129, 65), (256, 64)])
def test_any_width(d_in: int, d_out: int) -> None:
    assert_close(case(PADDED, d_in=d_in, d_outs=(d_out,), p=0.2), "triton", torch.float32)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranks", [(8, 8), (8, 8, 8), (5, 8, 8), (4, 4, 4, 4)])
def test_stacked_modules(ranks: tuple[int, ...], shared: bool) -> None:
    made = case(TWO_RUNS, d_outs=(33, 12, 40, 8)[: len(ranks)], ranks=ranks, p=0.2)
    assert_close(made, "triton", torch.float32, share_dropout=shared)


def test_modules_with_and_without_gates_share_a_launch() -> None:
    made = case(TWO_RUNS, d_outs=(33, 12), ranks=(8, 8), p=0.2)
    del made.modules[1]["gates"]
    assert_close(made, "triton", torch.float32)


@pytest.mark.parametrize(
    "needs", [c for n in range(5) for c in itertools.combinations(NAMES, n)], ids="-".join
)
@pytest.mark.parametrize("path", PATHS)
def test_any_subset_of_gradients(path: str, needs: tuple[str, ...]) -> None:
    assert_close(case(TWO_RUNS, p=0.3), path, torch.float32, needs)


@pytest.mark.parametrize("path", PATHS)
def test_without_gates_and_bias(path: str) -> None:
    assert_close(case(TWO_RUNS, gated=False, bias=False, p=0.3), path, torch.float32)


@pytest.mark.parametrize("rows", [Rows.padded(0, 4), Rows.from_lengths([0, 0])])
@pytest.mark.parametrize("path", PATHS)
def test_empty_batches_give_zero_gradients(path: str, rows: Rows) -> None:
    _, gradients = case(rows, p=0.1).run(path, torch.float32)
    assert len(gradients) == 4
    for name, gradient in gradients.items():
        assert not gradient.any(), name


def test_rows_of_no_sample_give_no_gradient_to_any_gate() -> None:
    rows = Rows.from_ids(torch.full((6,), -1), samples=2)
    made = case(rows, bias=False)
    ys, gradients = made.run("triton", torch.float32)
    expected = (made.x @ made.modules[0]["weight"].T).float()
    torch.testing.assert_close(ys[0], expected)
    for name in ("A0", "B0", "gates0"):
        assert not gradients[name].any()


@pytest.mark.parametrize("seed", [3, (1 << 40) + 9, -7])
@pytest.mark.parametrize("d", [29, 200])
def test_stored_bits_equal_the_oracle_whatever_the_tile(seed: int, d: int, monkeypatch) -> None:
    torch.manual_seed(0)
    x, A = torch.randn(RAGGED.tokens, d), torch.randn(5, d)
    drop = dropout(0.3, seed, (2,))
    mask = philox.keep_mask(seed, *x.shape, drop.threshold, 2)
    for tiles in ({}, {"BM": 16, "BK": 32}):
        config = configs.launch("down", None, 4).with_(**tiles)
        monkeypatch.setattr(configs, "launch", lambda *_, config=config: config)
        (H,), _, (bits,) = launch.TritonPath().down(x, (A,), (None,), RAGGED, (1.0,), drop, True)
        assert torch.equal(philox.unpack(bits[0], d), mask)
        torch.testing.assert_close(H, (x * mask * drop.scale) @ A.T, rtol=1e-4, atol=1e-4)


def test_masks_drawn_again_equal_stored_ones_in_both_gradients() -> None:
    torch.manual_seed(0)
    T, d, r = TWO_RUNS.tokens, 100, 5
    x, A, dH = torch.randn(T, d), torch.randn(r, d), torch.randn(T, r)
    drop = dropout(0.4, 77)
    path = launch.TritonPath()
    _, _, mask = path.down(x, (A,), (None,), TWO_RUNS, (1.0,), drop, True)
    dys = (torch.randn(T, 3),)
    results = [
        path.grad_down(dys, None, (dH,), (A,), x, drop, kept, True, (True,)) for kept in (mask, ())
    ]
    keep = philox.keep_mask(77, T, d, drop.threshold)
    for dx, (dA,) in results:
        torch.testing.assert_close(dx, (dH @ A) * keep * drop.scale)
        torch.testing.assert_close(dA, dH.T @ (x * keep * drop.scale))


def test_outputs_are_written_everywhere(monkeypatch) -> None:
    """Every buffer starts as NaN, so an element no kernel writes shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *shape, **options):
        made = empty(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert_close(case(RAGGED, d_in=70, p=0.2), "triton", torch.float32)


def test_gradients_match_finite_differences_at_a_fixed_seed() -> None:
    made = case(TWO_RUNS, d_in=24, p=0.3)
    _, gradients = made.run("triton", torch.float32)

    def value() -> float:
        ys, _ = made.run("triton", torch.float32, needs=())
        weights = torch.cos(torch.arange(ys[0].numel(), dtype=torch.float64)).view(ys[0].shape)
        return float((ys[0].double() * weights).sum())

    step = 1e-2
    for name, tensor in (("x", made.x), ("A0", made.modules[0]["A"])):
        for index in ((1, 3), (2, 17)):
            before = tensor[index].clone()
            tensor[index] = before + step
            above = value()
            tensor[index] = before - step
            below = value()
            tensor[index] = before
            found = (above - below) / (2 * step)
            assert found == pytest.approx(float(gradients[name][index]), rel=2e-3, abs=2e-3)


def test_repeats_are_equal_to_the_bit() -> None:
    made = case(RAGGED, d_in=64, p=0.1)
    (first,), gradients = made.run("triton", torch.float32)
    for _ in range(3):
        (y,), again = made.run("triton", torch.float32)
        assert torch.equal(y, first)
        assert all(torch.equal(again[name], gradients[name]) for name in gradients)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    made = case(RAGGED, d_in=64)
    (together,), _ = made.run("triton", torch.float32, needs=())
    first, count, sample = RAGGED.runs[2]
    alone = case(Rows.padded(1, count), d_in=64)
    alone.x = made.x[first : first + count]
    alone.modules = [dict(made.modules[0], gates=made.modules[0]["gates"][sample : sample + 1])]
    (y,), _ = alone.run("triton", torch.float32, needs=())
    assert torch.equal(y, together[first : first + count])


@pytest.mark.parametrize("path", PATHS)
def test_types_the_interpreter_gets_wrong_are_refused(path: str) -> None:
    with pytest.raises(KernelUnavailableError, match="bfloat16"):
        case(PADDED).run(path, torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match="float64"):
        case(PADDED).run(path, torch.float64)


def test_ranks_above_the_limit_are_refused() -> None:
    with pytest.raises(KernelUnavailableError, match="at most 64"):
        case(PADDED, d_in=80, d_outs=(80,), ranks=(65,)).run("triton", torch.float32)


@pytest.mark.parametrize(
    ("version", "numpy", "refused"),
    [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.0", False)],
)
def test_an_interpreter_that_cannot_loop_is_refused(
    version: str, numpy: str, refused: bool, monkeypatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(np, "__version__", numpy)
    if refused:
        with pytest.raises(KernelUnavailableError, match="NumPy before"):
            case(PADDED).run("triton", torch.float32)
    else:
        assert not launch.unavailable()

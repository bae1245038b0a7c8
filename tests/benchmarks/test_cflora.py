"""The CPU layer benchmark at tiny widths: its figures, and a gate that sees a wrong arm."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from benchmarks import cflora
from benchmarks.gpu_suite.layer import Arm, Layer, Shape
from benchmarks.report import Report
from benchmarks.rounds import Times
from rellax_ds import ops

SHAPE = Shape(width=48, tokens=24, samples=4, rank=4)

needs_cpu_path = pytest.mark.skipif("cpu" not in ops.available(), reason="no CPU path here")


@needs_cpu_path
def test_cflora_passes_its_gate_and_prints_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--widths 48 64 --tokens 32 --samples 4 --rank 4 --rounds 2 --threads 1 1"
    assert cflora.main([*arguments.split(), "--arms", "uncompiled"]) == 0
    out = capsys.readouterr().out
    figures = dict(line.split()[1:] for line in out.splitlines() if line.startswith("FIGURE "))
    assert list(figures) == [
        *("cpu_layer_ratio_48", "cpu_overhead_removed_48"),
        *("cpu_layer_ratio_64", "cpu_overhead_removed_64"),
        "gate_tax",
    ]
    assert float(figures["cpu_layer_ratio_48"]) > 0
    for arm in (
        "bare linear again",
        "PEFT, bf16 adapters",
        "CFLoRA eager",
        "CFLoRA cpu, gate-only",
    ):
        assert f"| {arm} |" in out


def transposed_gates(layer: Layer) -> Arm:
    other = copy.copy(layer)
    other.gates = layer.gates.detach().transpose(1, 2).contiguous().requires_grad_()
    return other.ours("transposed gates", "composable")


def larger_update(layer: Layer) -> Arm:
    other = copy.copy(layer)
    other.B = layer.B * 1.01
    return other.ours("larger update", "composable", gated=False)


def short_gradient(layer: Layer) -> Arm:
    """Right value; the gradient of x lacks the low-rank part."""
    arm = layer.ours("detached", "composable")
    return dataclasses.replace(
        arm, call=lambda x: arm.call(x.detach()) + layer.base(x) - layer.base(x).detach()
    )


@pytest.mark.parametrize("wrong", [transposed_gates, larger_update, short_gradient])
def test_gate_fails_for_a_wrong_arm(wrong) -> None:
    page = Report("t")
    cflora.check(page, SHAPE, lambda layer: [wrong(layer)])
    assert page.failures
    assert page.finish(write=False) == 1


def test_gate_holds_for_every_path_of_a_cpu() -> None:
    page = Report("t")
    cflora.check(page, SHAPE)
    assert not page.failures


def test_paired_ratios_take_both_turns_of_the_bare_linear() -> None:
    seconds = {cflora.BARE: 1.0, cflora.PEFT: 4.0, cflora.OURS: 2.5, cflora.AGAIN: 2.0}
    times = {name: Times(full=[each]) for name, each in seconds.items()}
    assert cflora.paired(times, cflora.removed) == [pytest.approx(1.5 / 2.5)]
    assert cflora.paired(times, cflora.ratio) == [2.5 / 4]

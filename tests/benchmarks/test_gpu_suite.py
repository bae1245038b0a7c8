"""The GPU suite where there is no GPU: all of it on tiny shapes, and what it does in trouble."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite import correctness
from benchmarks.gpu_suite.suite import Section, Suite
from rellax_ds import ops
from rellax_ds.kernels.composable import ComposablePath

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_suite_without_a_gpu_says_so_in_one_line() -> None:
    done = command()
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA GPU" in done.stdout


@pytest.mark.slow
def test_gpu_suite_on_a_cpu_passes_every_section_and_writes_both_reports(tmp_path: Path) -> None:
    done = command("--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (as_json,) = tmp_path.glob("*.json")
    found = json.loads(as_json.read_text())
    assert not [failure for section in found["sections"] for failure in section["failures"]]
    (tuned,) = next(s for s in found["sections"] if s["name"] == "autotune")["tables"]
    interpreted = importlib.util.find_spec("triton") is not None  # as tests/conftest.py asks for
    assert bool(tuned["rows"]) == interpreted
    assert all(row[6] > 0 for row in tuned["rows"])
    (layer,) = next(s for s in found["sections"] if s["name"] == "layer")["tables"]
    arms = [row[0] for row in layer["rows"]]
    assert arms[0] == "bare linear"
    assert arms[-1] == "bare linear again"
    assert {"PEFT, bf16 adapters, compiled", "CFLoRA composable"} <= set(arms)
    assert ("CFLoRA cpu" in arms) == ("cpu" in ops.available())
    assert all(row[3] > 0 for row in layer["rows"])
    page = as_json.with_suffix(".md").read_text()
    assert all(f"| {arm} |" in page for arm in arms)


def test_suite_records_errors_and_lost_time_and_goes_on(tmp_path: Path) -> None:
    def broken(section: Section) -> None:
        section.table("kept", ["a"]).rows.append([1])
        with section.part("the first half"):
            raise ValueError("half")
        raise RuntimeError("whole")

    def endless(section: Section) -> None:
        with section.part("a part"):
            time.sleep(30)

    suite = Suite({"gpu": "none"})
    suite.run("broken", 5, broken)
    suite.run("endless", 0.2, endless)
    suite.run("fine", 5, lambda section: None)
    assert suite.failed
    first, second, third = (section.failures for section in suite.sections)
    assert first[0] == "the first half: ValueError: half"
    assert "whole" in first[1]
    assert "TimeoutError" in second[0]
    assert suite.sections[1].seconds < 10
    assert third == []
    as_json, as_page = suite.write(tmp_path, "report")
    assert json.loads(as_json.read_text())["sections"][0]["tables"][0]["rows"] == [[1]]
    assert "## fine\n\npassed" in as_page.read_text()


def test_correctness_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ComposablePath.grad_gate

    def wrong(*args, **kwargs):
        dH, dG = right(*args, **kwargs)
        return dH, tuple(None if g is None else g * 1.1 for g in dG)

    monkeypatch.setattr(ComposablePath, "grad_gate", wrong)
    monkeypatch.setattr(correctness, "paths", lambda device: ("composable",))
    section = Section("correctness", 60)
    correctness.check(section, "cpu")
    assert section.failures
    assert all("gradient of gates" in failure for failure in section.failures)

"""Ahead-of-time compilation of the default kernels, in a process that does not interpret them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import dataclasses, json, sys
import triton
from benchmarks.aot import gate, measure
architecture, rank = map(int, sys.argv[1:])
found = measure((architecture, "bf16", rank))
binaries = [[v.id, gate(v, architecture, b), dataclasses.asdict(b)] for v, _, b in found]
print(json.dumps([triton.__version__, binaries]))
"""


def output_of(job: str, *arguments: object) -> Any:
    """What a job prints as JSON, with the same Triton as this process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *map(str, sys.path)])
    command = [sys.executable, "-c", job, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "rank"), [(80, 64), (90, 8), (100, 32)])
def test_default_configurations_pass_every_gate(architecture: int, rank: int) -> None:
    version, compiled = output_of(JOB, architecture, rank)
    assert version == triton.__version__
    found = {name: (failures, binary) for name, failures, binary in compiled}
    assert {"F1", "F2", "B1", "B2", "B3", "B4"} <= found.keys()
    for name, (failures, binary) in found.items():
        assert not failures, f"{name}: {failures}"
        assert 16 < binary["registers"] <= 255, name
        wide = binary["loads"].get("128", 0)
        assert wide, f"{name} has no 16-byte load"


def test_gates_see_a_configuration_that_spills() -> None:
    job = """
import json
from benchmarks.aot import gate
from rellax_ds.kernels import aot, configs
(variant,) = [v for v in aot.variants("bf16", 64) if v.id == "B2"]
config = configs.launch("grad_gate", 80, 2, 64).with_(num_warps=2, BM=64)
print(json.dumps(gate(variant, 80, aot.read(aot.compile_variant(variant, 80, config)))))
"""
    assert any("stack" in failure for failure in output_of(job))

"""Everything that needs a GPU, in one command of under ten minutes.

Correctness of every compute path, autotuning, a table of layer times, a whole training step. Writes
one JSON and one Markdown report and exits non-zero when a section failed. `--device cpu` runs the
same code on tiny shapes with the paths a CPU has; its times say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_suite import autotune, correctness, layer, step
from benchmarks.gpu_suite.suite import Suite
from benchmarks.report import REPORTS
from rellax_ds import ops, runtime


def main() -> int:
    """Run the sections and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=REPORTS, help="folder of the report")
    parser.add_argument(
        "--keep-tuning",
        action="store_true",
        help="write the timed configurations to the cache folder, where training finds them",
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: no CUDA GPU here; run it on one, or try it out with --device cpu")
        return 2
    runtime.prepare()
    suite = Suite(environment(options.device))
    device = options.device
    suite.run("correctness", 120, lambda section: correctness.check(section, device))
    suite.run(
        "autotune", 100, lambda section: autotune.measure(section, device, options.keep_tuning)
    )
    suite.run("layer", 260, lambda section: layer.measure(section, device))
    suite.run("training step", 90, lambda section: step.measure(section, device))
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    for path in suite.write(options.out, f"{today}-gpu_suite_{device}"):
        print(path)
    return 1 if suite.failed else 0


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    facts: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu_suite --device {device}",
        "commit": runtime.source_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{k} {v}" for k, v in runtime.versions().items()),
        "triton": triton_version(),
        "compute paths": ", ".join(ops.available()),
    }
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts["gpu"] = (
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} SMs"
        )
        facts["cuda"] = torch.version.cuda
    return facts


def triton_version() -> str:
    """Version of Triton, or that there is none."""
    try:
        import triton
    except ImportError:
        return "absent"
    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())

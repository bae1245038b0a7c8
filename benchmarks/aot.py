"""What the compiler makes of every Triton kernel, for GPUs this machine does not have.

Each kernel is compiled ahead of time for sm_80, sm_90 and sm_100 in its default configuration and
read with the disassembler. The gates: nothing on the stack (hence no spilled register), tensor
cores used, shared memory within the limit, no atomics, row offsets in 64 bits. The table is about
compiled code; it says nothing about speed.

Another Triton brings its own compiler and can be tried without installing it:

    pip install --no-deps --target FOLDER triton==3.9.0
    PYTHONPATH=FOLDER:. python -m benchmarks.aot
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import triton

from benchmarks.report import Report, parser
from rellax_ds.kernels import aot, configs

if TYPE_CHECKING:
    from collections.abc import Sequence

RANKS = (8, 16, 32, 64)
DTYPES = ("bf16", "fp16")
HEADER = (
    "kernel", "arch", "type", "r", "config", "registers", "stack", "shared", "matrix instructions",
    "global loads by bits", "integer instructions",
)  # fmt: skip
INTEGER = ("IMAD", "IADD3", "LOP3", "SHF", "LEA", "ISETP", "IMNMX", "VIADD", "PRMT", "SEL")

Task = tuple[int, str, int]


def measure(task: Task) -> list[tuple[aot.Variant, configs.Launch, aot.Binary]]:
    """Compile all kernels of one architecture, type and rank."""
    architecture, dtype, rank = task
    found = []
    for variant in aot.variants(dtype, rank):
        config = configs.launch(variant.kernel, architecture, 2, variant.constants["BR"])
        binary = aot.read(aot.compile_variant(variant, architecture, config))
        found.append((variant.without_function(), config, binary))
    return found


def gate(variant: aot.Variant, architecture: int, binary: aot.Binary) -> list[str]:
    """What a compiled kernel fails."""
    failures = []
    if binary.stack:
        failures.append(f"{binary.stack} bytes of stack")
    if variant.matrix and not binary.instructions.get(aot.MATRIX_OPS[architecture]):
        failures.append(f"no {aot.MATRIX_OPS[architecture]}")
    old = binary.instructions.get("HMMA", 0)
    if variant.matrix and architecture == 90 and old and not variant.gated:
        failures.append(f"{old} HMMA where HGMMA is possible")
    if binary.shared > aot.SHARED_LIMIT[architecture]:
        failures.append(f"{binary.shared} bytes of shared memory")
    if binary.atomics:
        failures.append(f"{binary.atomics} atomics")
    if not binary.wide_offsets:
        failures.append("32-bit row offsets")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, check and report."""
    options = parser(__doc__)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    options.add_argument("--dtypes", nargs="*", default=DTYPES, choices=("bf16", "fp16", "fp32"))
    chosen = options.parse_args(arguments)
    tasks: list[Task] = [
        (architecture, dtype, rank)
        for architecture in aot.ARCHITECTURES
        for dtype in chosen.dtypes
        for rank in chosen.ranks
    ]
    report = Report("aot")
    rows: list[list[object]] = []
    compiled, spills, hopper = 0, 0, []
    with ProcessPoolExecutor(chosen.workers, mp_context=get_context("spawn")) as pool:
        for task, found in zip(tasks, pool.map(measure, tasks), strict=True):
            architecture, dtype, rank = task
            for variant, config, binary in found:
                compiled += 1
                spills += binary.stack > 0
                matrix = binary.instructions.get(aot.MATRIX_OPS[architecture], 0)
                if architecture == 90 and variant.matrix:
                    hopper.append(matrix)
                for failure in gate(variant, architecture, binary):
                    report.check(
                        False, f"{variant.id} sm_{architecture} {dtype} r {rank}: {failure}"
                    )
                rows.append(
                    [
                        variant.id, f"sm_{architecture}", dtype, rank, describe(config),
                        binary.registers, binary.stack, binary.shared,
                        f"{matrix} {aot.MATRIX_OPS[architecture]}" if variant.matrix else "none",
                        " ".join(f"{n}x{bits}" for bits, n in sorted(binary.loads.items())),
                        sum(binary.instructions.get(name, 0) for name in INTEGER),
                    ]
                )  # fmt: skip
    report.body.append(
        f"Compiled with Triton {triton.__version__}; nothing was run. Stack and shared memory are "
        "bytes, the stack per thread; integer instructions are those of the whole kernel."
    )
    report.table(HEADER, rows)
    report.figures["aot_spills"] = spills
    report.figures["aot_hgmma_sm90"] = min(hopper, default=0)
    report.figures["aot_kernels"] = compiled
    return report.finish(chosen.report)


def describe(config: configs.Launch) -> str:
    """A configuration in a few characters."""
    tiles = "x".join(str(size) for name, size in config.tiles if name.startswith("B"))
    return f"{tiles}, {config.num_warps} warps, {config.num_stages} stages"


if __name__ == "__main__":
    sys.exit(main())

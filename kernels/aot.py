"""Compile the Triton kernels for a GPU this machine does not have, and read what came out.

Registers, stack, shared memory and instructions are facts of the compiled binary, so they can be
checked without a GPU or a driver. Argument types and divisibility are given exactly as a launch
from `kernels.launch` would specialise them; without those hints loads turn scalar and every count
is wrong.

Spilled registers live on the stack, so a stack of 0 bytes means no spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rellax_ds.kernels import configs, gemm, lowrank

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory one program may use."""

MATRIX_OPS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""Tensor-core instruction each architecture's kernels should use."""


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        id: Short name, such as `F1` or `B3 recompute`.
        kernel: Key of its launch configuration.
        function: The raw kernel.
        types: Triton type of every argument that is not a constant.
        constants: Values of the rest, without tile sizes.
        matrix: Whether its tiles are large enough for the architecture's widest matrix instruction.
    """

    id: str
    kernel: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    matrix: bool = True

    @property
    def gated(self) -> bool:
        """Whether it multiplies by a gate, an r x r product too small for the widest
        instruction.
        """
        return bool(self.constants.get("GATED"))

    def without_function(self) -> Variant:
        """A copy that can be sent between processes."""
        return replace(self, function=None)


@dataclass(frozen=True)
class Binary:
    """What was read off one compiled kernel.

    Attributes:
        registers: Per thread.
        stack: Bytes per thread; spilled registers are part of it.
        shared: Bytes of shared memory per program.
        instructions: Mnemonic without suffixes to number of occurrences.
        loads: Width in bits of global loads and asynchronous copies to their number.
        atomics: Atomic and reduction instructions on global memory.
        wide_offsets: Whether row offsets are computed in 64 bits.
    """

    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    loads: dict[int, int]
    atomics: int
    wide_offsets: bool


def variants(dtype: str, rank: int) -> list[Variant]:
    """The specialisations a training step launches, by kernel id.

    Args:
        dtype: Type of x and the factors, `bf16`, `fp16` or `fp32`.
        rank: r.
    """
    t = f"*{dtype}"
    ranks = {"R": rank, "BR": max(16, triton.next_power_of_2(rank))}
    return [
        *_down_variants(t, ranks),
        *_gemm_variants(t, ranks),
        *_grad_up_variants(t, ranks),
        *_grad_gate_variants(t, ranks),
        *_grad_a_variants(t, ranks),
    ]


def compile_variant(variant: Variant, architecture: int, config: configs.Launch) -> Any:
    """Compile for compute capability `architecture` / 10.

    Raises:
        triton.CompilationError: The kernel does not compile.
    """
    constants = {**variant.constants, **dict(config.tiles)}
    names = variant.function.arg_names
    missing = set(names) - set(variant.types) - set(constants)
    if missing:
        raise KeyError(f"{variant.id}: no type for {', '.join(sorted(missing))}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    hints = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in _DIVISIBLE
    }
    hints = {key: hint for key, hint in hints.items() if signature[names[key[0]]] != "constexpr"}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = ASTSource(variant.function, signature, values, hints)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def read(compiled: Any) -> Binary:
    """Read a compiled kernel's binary with the disassembler that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", path)
        sass = _tool("nvdisasm", "-c", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage[:200]}")
    operations = re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    loads: Counter[int] = Counter()
    for operation in operations:
        if operation.startswith(("LDG", "LDGSTS")):
            width = re.search(r"\.(64|128)\b", operation)
            loads[int(width.group(1)) if width else _narrow(operation)] += 1
    return Binary(
        registers=int(found.group(1)),
        stack=int(found.group(2)),
        shared=int(compiled.metadata.shared),
        instructions=dict(Counter(operation.split(".")[0] for operation in operations)),
        loads=dict(loads),
        atomics=sum(o.startswith(("ATOMG", "RED.", "REDG", "ATOM.")) for o in operations),
        wide_offsets="arith.extsi" in compiled.asm["ttir"],
    )


_DIVISIBLE = {"tokens", "d", "M", "N", "K", "right_k", "right_n", "q_r", "q_n", "rows_per_program"}
"""Integer arguments that are multiples of 16 at ordinary shapes."""

_STREAMS = {f"{name}_{m}": kind for m in range(3) for name, kind in (("scale", "fp32"),)}


def _streams() -> dict[str, str]:
    return {f"stream_{m}": "i32" for m in range(3)}


def _down_variants(t: str, ranks: dict[str, int]) -> list[Variant]:
    types = {"x": t, "A": t, "G": "*fp32", "H": t, "S": t, "bits": "*u8", "seed": "*i64"}
    types |= {"tiles": "*i32", "tokens": "i32", "d": "i32", "samples": "i32", "threshold": "i32"}
    types |= {"factor": "fp32", **_STREAMS, **_streams()}
    made = []
    for name, modules, drop, store in (
        ("F1", 1, True, True),
        ("F1 no dropout", 1, False, False),
        ("F1 gate-only", 1, True, False),
        ("F1 pair", 2, True, True),
    ):
        flags = {"N": modules, "GATED": True, "DROPOUT": drop, "SHARED": modules == 1}
        made.append(
            Variant(name, "down", lowrank.down_kernel, types, {**ranks, **flags, "STORE": store})
        )
    return made


def _gemm_variants(t: str, ranks: dict[str, int]) -> list[Variant]:
    types = dict.fromkeys(("left", "right", "P", "Q", "bias", "out"), t)
    types |= {"bits": "*u8", "seed": "*i64", "threshold": "i32", "factor": "fp32", "stream": "i32"}
    types |= dict.fromkeys(("M", "N", "K"), "i32")
    up = {**types, "right_n": "i32", "q_n": "i32"}
    down = {**types, "right_k": "i32", "q_r": "i32"}
    off = {"BIAS": False, "DROPOUT": False, "STORED": False, "ACCUMULATE": False}
    made = [Variant("F2", "gemm", gemm.gemm_kernel, up, {**ranks, **off, "right_k": 1, "q_r": 1})]
    for name, flags in (
        ("B3", {"DROPOUT": True, "STORED": True}),
        ("B3 recompute", {"DROPOUT": True}),
        ("B3 no dropout", {}),
        ("B3 second module", {"DROPOUT": True, "STORED": True, "ACCUMULATE": True}),
    ):
        constants = {**ranks, **off, **flags, "right_n": 1, "q_n": 1}
        key = "gemm_masked" if flags.get("STORED") else "gemm"
        made.append(Variant(name, key, gemm.gemm_kernel, down, constants))
    return made


def _grad_up_variants(t: str, ranks: dict[str, int]) -> list[Variant]:
    types = {"dy": t, "B": t, "S": t, "dS_parts": "*fp32", "dB_parts": "*fp32"}
    types |= {"tokens": "i32", "d": "i32", "rows_per_program": "i32"}
    return [
        Variant(
            name,
            "grad_up",
            lowrank.grad_up_kernel,
            types,
            {**ranks, "NEED_S": True, "NEED_B": need},
        )
        for name, need in (("B1", True), ("B1 gate-only", False))
    ]


def _grad_gate_variants(t: str, ranks: dict[str, int]) -> list[Variant]:
    types = {"dS_parts": "*fp32", "H": t, "G": "*fp32", "dH": "*fp32", "dG_parts": "*fp32"}
    types |= {"tiles": "*i32", "tokens": "i32", "chunks": "i32", "scaling": "fp32"}
    flags = {"GATED": True, "NEED_H": True, "NEED_G": True}
    return [Variant("B2", "grad_gate", lowrank.grad_gate_kernel, types, {**ranks, **flags}, False)]


def _grad_a_variants(t: str, ranks: dict[str, int]) -> list[Variant]:
    types = {"dH": t, "x": t, "parts": "*fp32", "bits": "*u8", "seed": "*i64", "tokens": "i32"}
    types |= {"d": "i32", "rows_per_program": "i32", "threshold": "i32", "factor": "fp32"}
    types |= _streams()
    made = []
    for name, modules, drop in (("B4", 1, True), ("B4 no dropout", 1, False), ("B4 pair", 2, True)):
        flags = {"N": modules, "DROPOUT": drop, "SHARED": modules == 1, "STORED": drop}
        made.append(Variant(name, "grad_a", lowrank.grad_a_kernel, types, {**ranks, **flags}))
    return made


def _narrow(operation: str) -> int:
    for suffix, bits in ((".U8", 8), (".S8", 8), (".U16", 16), (".S16", 16)):
        if suffix in operation:
            return bits
    return 32


def _tool(name: str, *arguments: object) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

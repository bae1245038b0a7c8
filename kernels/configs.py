"""Launch configurations of the Triton kernels: tile sizes, warps and pipeline stages.

Defaults are those whose compiled code passes every gate of `python -m benchmarks.aot` (no spills,
tensor cores used, shared memory within the architecture's limit); an unknown GPU takes those of the
oldest known one. A configuration is fixed per kernel, type and architecture, because the order of a
reduction follows from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Launch:
    """One configuration.

    Attributes:
        tiles: Values of the kernel's tile constants.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
    """

    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**dict(self.tiles), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def tile(self, name: str) -> int:
        """Value of one tile constant."""
        return dict(self.tiles)[name]

    def with_(self, **changes: int) -> Launch:
        """A copy with other tile sizes, warps or stages."""
        fields = asdict(self)
        tiles = dict(self.tiles)
        for name, value in changes.items():
            if name in fields:
                fields[name] = value
            else:
                tiles[name] = value
        return Launch(tuple(tiles.items()), fields["num_warps"], fields["num_stages"])


def _launch(num_warps: int, num_stages: int, **tiles: int) -> Launch:
    return Launch(tuple(tiles.items()), num_warps, num_stages)


KERNELS = ("down", "gemm", "grad_up", "grad_gate", "grad_a")

_INTERPRETER = {
    "down": _launch(4, 1, BM=32, BK=64),
    "gemm": _launch(4, 1, BM=32, BN=64, BK=32, GROUP=4),
    "grad_up": _launch(4, 1, BM=32, BN=64),
    "grad_gate": _launch(4, 1, BM=32),
    "grad_a": _launch(4, 1, BM=32, BN=64),
}
_AMPERE = {
    "down": _launch(8, 3, BM=64, BK=128),
    "gemm": _launch(8, 3, BM=128, BN=128, BK=64, GROUP=8),
    "grad_up": _launch(8, 2, BM=64, BN=256),
    "grad_gate": _launch(4, 1, BM=64),
    "grad_a": _launch(8, 2, BM=64, BN=256),
}
_HOPPER = {
    **_AMPERE,
    "gemm": _launch(8, 4, BM=128, BN=256, BK=64, GROUP=8),
}
_BLACKWELL = _AMPERE

_BY_ARCHITECTURE = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}


def launch(kernel: str, architecture: int | None, itemsize: int) -> Launch:
    """Configuration of a kernel.

    Args:
        kernel: One of `KERNELS`.
        architecture: Compute capability times ten; None is Triton's interpreter.
        itemsize: Bytes of an element of x; four-byte tiles take half the depth and stages.
    """
    if architecture is None:
        return _INTERPRETER[kernel]
    known = [key for key in _BY_ARCHITECTURE if key <= architecture] or [80]
    chosen = _BY_ARCHITECTURE[max(known)][kernel]
    if itemsize == 4:
        halved = {name: max(size // 2, 16) for name, size in chosen.tiles if name in ("BK", "BN")}
        return chosen.with_(num_stages=min(chosen.num_stages, 2), **halved)
    return chosen

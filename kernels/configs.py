"""Launch configurations of the Triton kernels: tile sizes, warps and pipeline stages.

Defaults are those whose compiled code passes every gate of `python -m benchmarks.aot` (no spills,
tensor cores used, shared memory within the architecture's limit); an unknown GPU takes those of the
oldest known one. A default is fixed per kernel, type and architecture, because the order of a
reduction follows from it. `candidates` are what `kernels.tuning` may time against a default, and
`smaller` is the way down where a GPU lacks the resources for one.
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


KERNELS = ("down", "gemm", "gemm_masked", "grad_up", "grad_gate", "grad_a")
"""Keys of the table; `gemm_masked` is the product that unpacks stored masks."""

_INTERPRETER = {
    "down": _launch(4, 1, BM=32, BK=64),
    "gemm": _launch(4, 1, BM=32, BN=64, BK=32, GROUP=4),
    "gemm_masked": _launch(4, 1, BM=32, BN=64, BK=32, GROUP=4),
    "grad_up": _launch(4, 1, BM=32, BN=64),
    "grad_gate": _launch(4, 1, BM=32),
    "grad_a": _launch(4, 1, BM=32, BN=64),
}
_AMPERE = {
    "down": _launch(8, 3, BM=64, BK=64),
    "gemm": _launch(8, 3, BM=128, BN=128, BK=64, GROUP=8),
    "gemm_masked": _launch(8, 3, BM=128, BN=128, BK=64, GROUP=8),
    "grad_up": _launch(8, 2, BM=64, BN=256),
    "grad_gate": _launch(8, 1, BM=64),
    "grad_a": _launch(8, 3, BM=64, BN=128),
}
_HOPPER = {
    **_AMPERE,
    "gemm": _launch(8, 4, BM=128, BN=256, BK=64, GROUP=8),
    "grad_up": _launch(8, 2, BM=64, BN=512),
}
_BLACKWELL = {**_AMPERE, "grad_up": _launch(8, 2, BM=64, BN=512)}

_BY_RANK: dict[tuple[int, int], dict[str, dict[str, int]]] = {
    (80, 64): {"down": {"BM": 32}},
    (100, 32): {"down": {"BK": 32}},  # 64 spills with Triton 3.8
    (100, 64): {"gemm_masked": {"BN": 64}},
}
"""What changes at an architecture for ranks that fill a block of this many."""

_WIDE_RANK = {
    "gemm": {"num_stages": 3},
    "gemm_masked": {"num_stages": 2},
    "grad_up": {"BN": 128},
    "grad_gate": {"BM": 32},
}
"""What changes on every architecture when a rank fills a block of 64."""

_BY_ARCHITECTURE = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}

_PRODUCT: tuple[dict[str, int], ...] = (
    {"BM": 128, "BN": 256, "num_stages": 3},
    {"BM": 128, "BN": 128, "num_stages": 4},
    {"BM": 128, "BN": 128, "num_stages": 3},
    {"BM": 128, "BN": 128, "num_stages": 4, "num_warps": 4},
    {"BM": 64, "BN": 256, "num_stages": 4},
    {"BM": 64, "BN": 128, "num_stages": 4, "num_warps": 4},
    {"BM": 128, "BN": 64, "num_stages": 4, "num_warps": 4},
    {"GROUP": 16},
    {"BK": 32, "num_stages": 5},
)
_ALTERNATIVES: dict[str, tuple[dict[str, int], ...]] = {
    "down": (
        {"BM": 32},
        {"BM": 32, "num_warps": 4},
        {"BM": 64, "num_warps": 4},
        {"BM": 128},
        {"num_stages": 4},
        {"num_stages": 2},
        {"BK": 64},
        {"BK": 128},
    ),
    "gemm": _PRODUCT,
    "gemm_masked": _PRODUCT,
    "grad_up": (
        {"num_stages": 1},
        {"num_stages": 3},
        {"num_warps": 4},
        {"BM": 32, "num_stages": 3},
        {"BN": 128, "num_stages": 3},
        {"BN": 256},
    ),
    "grad_gate": ({"num_warps": 4}, {"num_stages": 2}, {"BM": 32}),
    "grad_a": (
        {"num_stages": 2},
        {"num_stages": 4},
        {"num_warps": 4},
        {"BM": 32},
        {"BN": 64},
        {"BN": 256},
    ),
}
"""What candidates change of the default, in sizes for two-byte elements."""

_SUMMED = {
    "down": ("BK",),
    "gemm": ("BK",),
    "gemm_masked": ("BK",),
    "grad_up": ("BM", "BN"),
    "grad_gate": ("BM",),
    "grad_a": ("BM", "BN"),
}
"""Tile constants that decide how a kernel cuts a sum; other sizes only group independent rows."""

_LEAST = {"BM": 16, "BN": 32, "BK": 32}


def launch(kernel: str, architecture: int | None, itemsize: int, block_rank: int = 16) -> Launch:
    """Configuration of a kernel.

    Args:
        kernel: One of `KERNELS`.
        architecture: Compute capability times ten; None is Triton's interpreter.
        itemsize: Bytes of an element of x; four-byte tiles take half the depth and stages.
        block_rank: Registers a rank takes, a power of two.
    """
    if architecture is None:
        return _INTERPRETER[kernel]
    return _fitted(_table(kernel, architecture, block_rank), itemsize)


def candidates(
    kernel: str, architecture: int | None, itemsize: int, block_rank: int = 16
) -> tuple[Launch, ...]:
    """Configurations worth timing, the default of `launch` first; arguments as there.

    Every one computes the right result; one that a GPU has no room for fails when it is launched.
    """
    found = [launch(kernel, architecture, itemsize, block_rank)]
    if architecture is None:
        tiles = [(name, size) for name, size in found[0].tiles if size > 16]
        made = [found[0].with_(**{name: size // 2}) for name, size in tiles]
    else:
        table = _table(kernel, architecture, block_rank)
        made = [_fitted(table.with_(**each), itemsize) for each in _ALTERNATIVES[kernel]]
    for config in made:
        if config not in found:
            found.append(config)
    return tuple(found)


def reorders(kernel: str, one: Launch, other: Launch) -> bool:
    """Whether two configurations of a kernel cut a sum into different parts."""
    return any(one.tile(name) != other.tile(name) for name in _SUMMED[kernel])


def smaller(config: Launch) -> Launch | None:
    """The next configuration that needs less shared memory, or None at the end of the way.

    Stages go first, which leaves every sum as it is; then the largest tile is halved.
    """
    if config.num_stages > 1:
        return config.with_(num_stages=config.num_stages - 1)
    left = [(size, name) for name, size in config.tiles if size > _LEAST.get(name, size)]
    if not left:
        return None
    size, name = max(left)
    return config.with_(**{name: size // 2})


def valid(kernel: str, config: Launch) -> bool:
    """Whether a configuration has the kernel's tile constants, and sizes a launch accepts."""
    names = {name for name, _ in _INTERPRETER[kernel].tiles}
    sizes = [size for name, size in config.tiles if name != "GROUP"]
    return (
        {name for name, _ in config.tiles} == names
        and len(config.tiles) == len(names)
        and all(16 <= size <= 1024 and size & (size - 1) == 0 for size in sizes)
        and all(1 <= size <= 64 for name, size in config.tiles if name == "GROUP")
        and config.num_warps in (1, 2, 4, 8, 16)
        and 1 <= config.num_stages <= 8
    )


def _table(kernel: str, architecture: int, block_rank: int) -> Launch:
    """Default for two-byte elements."""
    known = max([key for key in _BY_ARCHITECTURE if key <= architecture] or [80])
    chosen = _BY_ARCHITECTURE[known][kernel]
    if block_rank >= 64:
        chosen = chosen.with_(**_WIDE_RANK.get(kernel, {}))
    by_rank = _BY_RANK.get((known, min(block_rank, 64)), {})
    return chosen.with_(**by_rank.get(kernel, {}))


def _fitted(config: Launch, itemsize: int) -> Launch:
    if itemsize != 4:
        return config
    halved = {name: max(size // 2, 16) for name, size in config.tiles if name in ("BK", "BN")}
    return config.with_(num_stages=min(config.num_stages, 2), **halved)

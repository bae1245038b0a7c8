"""Dropout by position: the keep mask of element (row, column) is a pure function of seed and place.

One generator for all compute paths, so a mask is the same for any tile size, in the backward pass,
in a recomputation under gradient checkpointing, and on every device. It is Philox4x32 (Salmon et
al., SC 2011) with 7 rounds: key = the low and high word of the seed, counter = (column // 8, row,
stream, 0). Its four 32-bit words are eight 16-bit lanes for eight neighbouring columns, the low
half of a word first. An element is kept when its lane is at least the threshold, so a rate is
realised in steps of 2^-16.

This is the plain torch form: exact, any device, and the oracle of the compiled ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUNDS = 7
LEVELS = 1 << 16
LANES = 8

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call of the operator; no object at all means no dropout.

    Attributes:
        seed: int64 [1] on the device of x.
        threshold: 1 to 65,535; the drop rate is threshold / 65,536.
        streams: Third counter word of each module; equal streams share one mask.
    """

    seed: torch.Tensor
    threshold: int
    streams: tuple[int, ...]

    @property
    def scale(self) -> float:
        """1 / (1 - rate) for the realised rate."""
        return LEVELS / (LEVELS - self.threshold)


def threshold_of(p: float) -> int:
    """Threshold of drop rate p.

    Raises:
        ValueError: p is outside [0, 1) or rounds to 1.
    """
    threshold = round(p * LEVELS) if 0 <= p < 1 else LEVELS
    if threshold >= LEVELS:
        raise ValueError(f"drop rate {p} is outside [0, 1)")
    return threshold


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed, int64 [1], from the device's own generator, which checkpointing restores."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=device)


def words(
    seed: int, counters: tuple[torch.Tensor, ...], rounds: int = ROUNDS
) -> list[torch.Tensor]:
    """Four words, int64 tensors holding uint32 values, for broadcastable counters of that kind."""
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    c = list(counters)
    for _ in range(rounds):
        low_0, high_0 = _multiply(c[0], _MULTIPLIERS[0])
        low_1, high_1 = _multiply(c[2], _MULTIPLIERS[1])
        c = [high_1 ^ c[1] ^ keys[0], low_1, high_0 ^ c[3] ^ keys[1], low_0]
        keys = [(key + step) & _WORD for key, step in zip(keys, _WEYL, strict=True)]
    return c


def keep_mask(
    seed: int,
    rows: int,
    columns: int,
    threshold: int,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Mask of an input [rows, columns], bool, true where the element is kept."""
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange(-(-columns // LANES), device=device)[None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    drawn = words(seed, (group, row, zero + stream, zero))
    lanes = [lane for word in drawn for lane in (word & (LEVELS - 1), word >> 16)]
    lanes = [lane.expand(rows, group.shape[1]) for lane in lanes]
    kept = torch.stack(lanes, dim=-1) >= threshold
    return kept.view(rows, group.shape[1] * LANES)[:, :columns]


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a mask [T, d]: uint8 [T, ceil(d / 8)], bit j of byte g is column 8 g + j."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % LANES))
    weights = 1 << torch.arange(LANES, device=mask.device)
    grouped = padded.view(mask.shape[0], -(-mask.shape[1] // LANES), LANES)
    return (grouped * weights).sum(-1).to(torch.uint8)


def unpack(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """Mask [T, columns], bool, of packed bits."""
    shifts = torch.arange(LANES, device=bits.device, dtype=torch.uint8)
    return (bits[..., None] >> shifts & 1).bool().flatten(1)[:, :columns]


def _multiply(value: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high word of a product of two 32-bit words, without overflowing int64."""
    low, high = value & (LEVELS - 1), value >> 16
    first = low * factor
    second = high * factor + (first >> 16)
    return (first & (LEVELS - 1)) | ((second & (LEVELS - 1)) << 16), second >> 16

"""The order of samples: a pure function of (seed, epoch, position), so a resume costs nothing.

Integer arithmetic only. A library's random stream may change between versions, and a resume after
an upgrade would then reorder silently; the permutation here is pinned by golden tests. Length
bucketing happens inside a short window of steps, so a step's samples follow from its number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from rellax_ds import runtime
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

WINDOW_STEPS = 16
"""Steps whose samples are sorted by length together."""

_ROUNDS = 8
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Samples(Protocol):
    """What the order needs of a set of prompts; a `ShardReader` is one."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every prompt [N]."""
        ...

    def __len__(self) -> int:
        """N."""
        ...


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: a bijection on 64-bit words with good avalanche."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(positions: npt.ArrayLike, size: int, key: int) -> npt.NDArray[np.int64]:
    """Images of `positions` under a keyed permutation of `range(size)`.

    A balanced Feistel network over the next even number of bits; images outside the range are fed
    back until they fall inside (cycle walking), which keeps it a permutation of any size.

    Args:
        positions: Integers in `range(size)` [N].
        size: Number of things permuted.
        key: 64-bit key.

    Returns:
        int64 [N].
    """
    values = np.asarray(positions, np.uint64)
    half = (max(size - 1, 3).bit_length() + 1) // 2
    keys = mix64(np.array([(key + (n + 1) * _GOLDEN) & _WORD for n in range(_ROUNDS)], np.uint64))
    outside = np.ones(values.shape, bool)
    while outside.any():
        values = values.copy()
        values[outside] = _feistel(values[outside], np.uint64(half), keys)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def epoch_order(size: int, seed: int, epoch: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Sample positions `start:stop` of an epoch's stream over `size` samples."""
    key = runtime.stable_seed("order", seed, epoch)
    return permute(np.arange(start, stop, dtype=np.uint64), size, key)


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Optimiser steps in an epoch; the last samples that do not fill a batch are left out.

    Raises:
        ConfigError: There are fewer samples than one global batch.
    """
    if num_samples < global_batch:
        raise ConfigError(
            f"train.global_batch {global_batch} is larger than the {num_samples} training prompts;"
            " lower it or raise shards.train_rows"
        )
    return num_samples // global_batch


def step_batches(
    samples: Samples,
    seed: int,
    epoch: int,
    step: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """One rank's micro-batches of one optimiser step.

    The epoch's order is cut into windows of `WINDOW_STEPS` steps. A window's samples are sorted by
    prompt length, cut into global batches, and these are dealt to its steps in a seeded order: the
    ranks of a step meet prompts of like length, so none waits for another's longer ones. Inside a
    step, micro-batch m goes to rank m mod world_size. The cut does not depend on the world size, so
    neither do the gradients, up to the order of their sum.

    Args:
        samples: The training shards.
        seed: The recipe's seed.
        epoch: From 0.
        step: Step of the epoch, from 0.
        global_batch: G, samples in a step over all ranks.
        micro_batch: Samples in one forward pass.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        Micro-batches of sample positions; the same number on every rank.

    Raises:
        ConfigError: G is no multiple of micro_batch x world_size, or the step lies past the epoch.
    """
    if global_batch % (micro_batch * world_size):
        raise ConfigError(
            f"train.global_batch {global_batch} is no multiple of micro_batch {micro_batch} x"
            f" {world_size} processes"
        )
    steps = steps_per_epoch(len(samples), global_batch)
    if not 0 <= step < steps:
        raise ConfigError(f"step {step} lies outside an epoch of {len(samples)} samples")
    first = step - step % WINDOW_STEPS
    last = min(first + WINDOW_STEPS, steps)
    window = epoch_order(len(samples), seed, epoch, first * global_batch, last * global_batch)
    window = window[np.lexsort((window, samples.lengths[window]))]
    key = runtime.stable_seed("window", seed, epoch, first)
    (place,) = permute(np.array([step - first], np.uint64), last - first, key)
    micro_batches = window.reshape(last - first, -1, micro_batch)[place]
    return [batch.tolist() for batch in micro_batches[rank::world_size]]


class EvalBatch(NamedTuple):
    """A batch of an evaluation pass.

    Attributes:
        positions: Sample positions.
        repeated: True for a filler that only keeps the ranks' collectives aligned: run the forward
            pass and discard its scores, the samples are another rank's.
    """

    positions: list[int]
    repeated: bool


def eval_batches(
    samples: Samples, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[EvalBatch]:
    """One rank's share of all samples, longest prompts first.

    Every position is in exactly one batch that is not `repeated`, over all ranks, and every rank
    gets the same number of batches: a rank without one left repeats the shortest sample.
    """
    order = np.lexsort((np.arange(len(samples)), -samples.lengths))
    batches = [
        EvalBatch(order[start : start + batch_size].tolist(), repeated=False)
        for start in range(0, len(order), batch_size)
    ]
    missing = -len(batches) % world_size
    batches += [EvalBatch([int(order[-1])], repeated=True)] * missing
    return batches[rank::world_size]


def spread(ids: npt.NDArray[np.int64], count: int) -> list[int]:
    """Positions of at most `count` samples, spread evenly over the sorted ids."""
    chosen = np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(np.int64)
    return [int(position) for position in np.argsort(ids, kind="stable")[chosen]]


def _feistel(
    values: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half) | right

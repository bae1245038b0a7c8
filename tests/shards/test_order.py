from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rellax_ds.errors import ConfigError
from rellax_ds.shards.order import (
    WINDOW_STEPS,
    epoch_order,
    eval_batches,
    mix64,
    permute,
    step_batches,
    steps_per_epoch,
)


@dataclass
class Lengths:
    """Prompts of which only the lengths matter."""

    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


@pytest.fixture
def samples() -> Lengths:
    return Lengths(np.random.default_rng(0).integers(5, 90, 101))


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_of_any_size_and_key_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_order_is_pinned_for_ever() -> None:
    # A change here reorders every run that resumes after an upgrade.
    mixed = mix64(np.array([1, 2**63], np.uint64)).tolist()
    assert mixed == [6238072747940578789, 2720858781877447050]
    assert permute(np.arange(10), 10, 7).tolist() == [6, 8, 4, 5, 7, 3, 1, 9, 2, 0]
    middle = epoch_order(1_000_003, 42, 0, 500_000, 500_004).tolist()
    assert middle == [888833, 885221, 292872, 867038]


def test_order_changes_with_seed_and_epoch_and_not_with_the_slice() -> None:
    whole = epoch_order(1000, 42, 0, 0, 1000)
    assert np.array_equal(whole[300:317], epoch_order(1000, 42, 0, 300, 317))
    for other in (epoch_order(1000, 43, 0, 0, 1000), epoch_order(1000, 42, 1, 0, 1000)):
        # Two unrelated permutations agree in one place on average.
        assert (whole == other).sum() < 10


def test_order_of_neighbours_is_not_kept() -> None:
    steps = np.diff(epoch_order(4096, 1, 0, 0, 4096))
    assert abs(steps).mean() == pytest.approx(4096 / 3, rel=0.1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_step_batches_hold_the_same_micro_batches_at_any_world_size(
    samples: Lengths, world_size: int
) -> None:
    alone = step_batches(samples, 42, 3, 2, 16, 4, 0, 1)
    ranks = [step_batches(samples, 42, 3, 2, 16, 4, r, world_size) for r in range(world_size)]
    assert [batch for group in zip(*ranks, strict=True) for batch in group] == alone


def test_steps_of_a_window_hold_its_samples_once_and_neighbouring_windows_stay_apart() -> None:
    samples = Lengths(np.random.default_rng(1).integers(5, 90, 40 * 8))
    for first, last in ((0, WINDOW_STEPS), (WINDOW_STEPS, 32), (32, 40)):
        used = [
            n
            for s in range(first, last)
            for b in step_batches(samples, 9, 1, s, 8, 4, 0, 1)
            for n in b
        ]
        assert sorted(used) == sorted(epoch_order(320, 9, 1, first * 8, last * 8).tolist())


def test_ranks_of_a_step_meet_prompts_of_like_length() -> None:
    samples = Lengths(np.random.default_rng(2).integers(5, 90, 64 * 16))
    spread, means = [], []
    for step in range(64):
        ranks = [step_batches(samples, 7, 0, step, 16, 8, r, 2)[0] for r in range(2)]
        longest = [int(samples.lengths[batch].max()) for batch in ranks]
        spread.append(abs(longest[0] - longest[1]))
        means.append(float(np.mean(longest)))
    assert np.mean(spread) < 6
    # Lengths are not visited in order: neighbouring steps are far apart.
    assert np.abs(np.diff(means)).mean() > 15


def test_step_batches_of_an_epoch_use_no_sample_twice(samples: Lengths) -> None:
    steps = steps_per_epoch(101, 16)
    used = [n for s in range(steps) for b in step_batches(samples, 1, 0, s, 16, 8, 0, 1) for n in b]
    assert steps == 6
    assert len(set(used)) == len(used) == 96


def test_step_batches_gather_prompts_of_like_length(samples: Lengths) -> None:
    batches = step_batches(samples, 42, 0, 0, 16, 4, 0, 1)
    bounds = [(min(samples.lengths[b]), max(samples.lengths[b])) for b in batches]
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(bounds))


def test_step_batches_that_do_not_divide_are_refused(samples: Lengths) -> None:
    with pytest.raises(ConfigError, match="16 is no multiple of micro_batch 4 x 3"):
        step_batches(samples, 42, 0, 0, 16, 4, 0, 3)
    with pytest.raises(ConfigError, match="outside an epoch"):
        step_batches(samples, 42, 0, 6, 16, 4, 0, 1)
    with pytest.raises(ConfigError, match=r"lower it or raise shards\.train_rows"):
        steps_per_epoch(15, 16)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 20])
def test_eval_batches_hold_every_sample_once_over_equal_ranks(
    samples: Lengths, world_size: int
) -> None:
    ranks = [eval_batches(samples, 8, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    scored = [n for batches in ranks for b in batches if not b.repeated for n in b.positions]
    assert sorted(scored) == list(range(101))
    assert all(b.positions for batches in ranks for b in batches)
    longest = [samples.lengths[batches[0].positions[0]] for batches in ranks[:13]]
    assert longest[0] == samples.lengths.max()

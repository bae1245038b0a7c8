"""The dropout generator: against a scalar Philox, and the statistics dropout needs."""

from __future__ import annotations

import pytest
import torch

from rellax_ds.kernels import philox


def scalar(seed: int, counter: list[int], rounds: int) -> list[int]:
    """Philox4x32 in Python integers, as published."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    c = counter
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (second >> 32) ^ c[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_published_known_answers() -> None:
    """Random123's known-answer vectors for philox4x32-10."""
    zero = torch.zeros((), dtype=torch.int64)
    ours = [int(w) for w in philox.words(0, (zero, zero, zero, zero), rounds=10)]
    assert ours == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = torch.tensor(0xFFFFFFFF)
    ours = [int(w) for w in philox.words(-1, (ones, ones, ones, ones), rounds=10)]
    assert ours == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 12345, (1 << 40) + 9, -7])
def test_mask_follows_the_contract_element_by_element(seed: int) -> None:
    threshold, stream = 30_000, 2
    mask = philox.keep_mask(seed, 5, 21, threshold, stream)
    for row in range(5):
        for column in range(21):
            word = scalar(seed, [column // 8, row, stream, 0], 7)[column % 8 // 2]
            lane = word >> 16 if column % 2 else word & 0xFFFF
            assert bool(mask[row, column]) == (lane >= threshold)


def test_packed_bits_give_the_mask_back() -> None:
    mask = philox.keep_mask(3, 9, 29, 20_000)
    bits = philox.pack(mask)
    assert bits.shape == (9, 4)
    assert bits[0, 0] == sum(int(bit) << j for j, bit in enumerate(mask[0, :8]))
    assert torch.equal(philox.unpack(bits, 29), mask)


def test_keep_rate_is_within_four_sigma_and_streams_are_independent() -> None:
    p, shape = 0.05, (512, 1024)
    threshold = philox.threshold_of(p)
    first, second = (philox.keep_mask(11, *shape, threshold, stream) for stream in (0, 1))
    n = first.numel()
    for mask in (first, second):
        assert abs(float(mask.double().mean()) - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5
    both = float((~first & ~second).double().mean())
    assert abs(both - p * p) < 4 * (p * p / n) ** 0.5


def test_threshold_refuses_rates_that_drop_everything() -> None:
    assert philox.threshold_of(0.0) == 0
    for p in (-0.1, 1.0, 0.9999999):
        with pytest.raises(ValueError, match="outside"):
            philox.threshold_of(p)


def test_seed_comes_from_torchs_generator() -> None:
    torch.manual_seed(4)
    first = philox.draw_seed(torch.device("cpu"))
    torch.manual_seed(4)
    assert torch.equal(philox.draw_seed(torch.device("cpu")), first)

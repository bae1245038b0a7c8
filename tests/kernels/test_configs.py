"""Launch configurations: every kernel on every GPU has one, and a launch reads it back."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rellax_ds.kernels import configs


@pytest.mark.parametrize("architecture", [None, 70, 80, 86, 89, 90, 100, 120, 999])
@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rank", [16, 32, 64])
def test_unknown_gpus_take_the_nearest_known_one(
    architecture: int | None, kernel: str, itemsize: int, rank: int
) -> None:
    config = configs.launch(kernel, architecture, itemsize, rank)
    assert config.num_warps in (4, 8)
    for name, size in config.tiles:
        assert size & (size - 1) == 0, name
        assert size >= 16 or name == "GROUP"
    assert config.options()["BM"] == config.tile("BM")


def test_a_copy_changes_only_what_is_named() -> None:
    config = configs.launch("gemm", 90, 2)
    changed = config.with_(BN=64, num_stages=2)
    assert (changed.tile("BN"), changed.num_stages) == (64, 2)
    assert changed.tile("BM") == config.tile("BM")
    assert changed.num_warps == config.num_warps

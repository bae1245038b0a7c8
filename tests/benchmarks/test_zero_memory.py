"""The memory benchmark on a random tiny Llama: a rank holds what is planned, or the gate fails."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from benchmarks import zero_memory, zero_memory_rank
from benchmarks.report import Report
from benchmarks.zero_memory_rank import Held
from rellax_ds.config import load_recipe
from rellax_ds.testing import tiny_recipe

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe(tmp_path_factory.mktemp("memory"))


def test_rank_holds_what_is_planned(path: Path, tmp_path: Path) -> None:
    zero_memory_rank.main(str(path), TOKENS, tmp_path / "0.json")
    held = Held(**json.loads((tmp_path / "0.json").read_text()))
    wanted = zero_memory.planned(load_recipe(path), TOKENS, ranks=1)
    for name in ("weights", "adam", "gradients"):
        assert getattr(held, name) == wanted[name], name


def test_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, time; sys.exit(3) if int(sys.argv[1]) else time.sleep(60)"

    started: list[subprocess.Popen[bytes]] = []

    def start(*given: object) -> object:
        rank, folder = int(str(given[2])), given[5]
        (folder / f"{rank}.log").write_text(f"rank {rank} says")  # type: ignore[operator]
        started.append(subprocess.Popen([sys.executable, "-c", script, str(rank)]))
        return started[-1]

    monkeypatch.setattr(zero_memory, "start", start)
    with pytest.raises(RuntimeError, match=r"a rank failed: rank 0 says.*rank 1 says"):
        zero_memory.measure("no recipe", TOKENS, ranks=2, timeout=30)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_gate_fails_where_the_plan_is_off(path: Path) -> None:
    recipe = load_recipe(path)
    found = {}
    for ranks in zero_memory.RANKS:
        wanted = zero_memory.planned(recipe, TOKENS, ranks)
        found[ranks] = [Held(**wanted, libraries=0)] * ranks
    page = Report("t")
    zero_memory.describe(page, recipe, TOKENS, found)
    # This model is so small that all of it stays whole on both ranks.
    assert page.failures == [f for f in page.failures if "of one rank's weights" in f]
    found[2] = [replace(found[2][0], adam=found[2][0].adam * 2), found[2][1]]
    page = Report("t")
    zero_memory.describe(page, recipe, TOKENS, found)
    assert any(f.startswith("adam, rank 0 of 2") and "+100.0%" in f for f in page.failures)

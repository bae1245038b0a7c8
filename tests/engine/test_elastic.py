"""State restored on other numbers of ranks, under ZeRO-2 and ZeRO-3, in real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import run_job
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Sequence

Case = tuple[str, int]
"""Precision and ZeRO stage."""

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FULL = (("fp32", 2), ("fp32", 3))
HALF = ("bf16", 3)
MOVES = [("two-one", "two-two"), ("two-four", "two-two"), ("four-two", "four-four")]
MOVES += [("one-two", "two-two")]
CASES = [(moved, stayed, case) for case in FULL for moved, stayed in MOVES]
CASES += [("two-one", "two-two", HALF)]


def tasks(cases: Sequence[Case], *moves: tuple[str | None, str]) -> list[list[Any]]:
    """Every move (from, to) in every case."""
    return [
        [
            *(precision, stage),
            *(source and f"{source}-{precision}-{stage}", f"{to}-{precision}-{stage}"),
            to == "poisoned",
        ]
        for precision, stage in cases
        for source, to in moves
    ]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States by name: those of one, two and four ranks at step 3, and what each came to at 6."""
    folder = tmp_path_factory.mktemp("states")
    launches = [
        (2, tasks((*FULL, HALF), (None, "two"), ("two", "two-two"))),
        (1, [*tasks(FULL, (None, "one")), *tasks((*FULL, HALF), ("two", "two-one"))]),
        (4, tasks(FULL, (None, "four"), ("two", "two-four"), ("four", "four-four"))),
        (2, tasks(FULL, ("one", "one-two"), ("four", "four-two"), (None, "poisoned"))),
    ]
    run_job(Path(__file__).with_name("elastic_job.py"), str(folder), json.dumps(launches))
    return folder


def state(folder: Path, name: str, case: Case) -> tuple[dict[str, torch.Tensor], Any]:
    path = folder / f"{name}-{case[0]}-{case[1]}"
    return load_file(path), json.loads(Path(f"{path}.json").read_text())


@pytest.mark.parametrize(("moved", "stayed", "case"), CASES, ids=str)
def test_state_moved_to_another_number_of_ranks_trains_on_as_if_it_had_stayed(
    states: Path, moved: str, stayed: str, case: Case
) -> None:
    tensors, facts = state(states, moved, case)
    expected, wanted = state(states, stayed, case)
    if case[0] == "fp32":
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6)
    assert facts["losses"] == pytest.approx(
        wanted["losses"], abs=1e-6 if case[0] == "fp32" else 0.02
    )
    assert facts["groups"] == wanted["groups"]
    assert facts["groups"]["inner"]["step"] == facts["groups"]["outer"]["step"] == 6
    assert facts["global_steps"] == 6
    rates = [facts["groups"][name]["lr"] for name in ("inner", "outer")]
    assert rates == pytest.approx([0.05 * 0.9**5, 0.2 * 0.9**5])
    assert [facts["groups"][name]["weight_decay"] for name in ("inner", "outer")] == [0.1, 0.0]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_row_without_a_finite_loss_on_one_rank_skips_the_step_on_both(
    states: Path, case: Case
) -> None:
    tensors, facts = state(states, "poisoned", case)
    assert facts["skipped"] == [[False, True, False]] * 2
    assert [loss == loss for loss in facts["losses"]] == [True, False, True]
    assert facts["skipped_steps"] == 1
    assert {group["step"] for group in facts["groups"].values()} == {2}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())

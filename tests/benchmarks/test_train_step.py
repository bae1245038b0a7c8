"""The step benchmark on a random tiny Llama: its gate can fail, its arms read the same words."""

from __future__ import annotations

import multiprocessing
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import train_step, train_step_arms
from benchmarks.report import Report
from benchmarks.train_step_arms import Outcome, Prompts, Setting, Turns
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import load_recipe
from rellax_ds.stages.pipeline import load_stage
from rellax_ds.testing import made_recommender, made_tables, tiny_recipe

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

STEPS = 3


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("step")
    recipe = load_recipe(tiny_recipe(folder, train={"history_weight": 0.0}))
    work = WorkDir(folder / "work")
    load_stage("tables").run(recipe, work)
    attempt = work.open("crm", {}, {})
    made_recommender(attempt.begin(), made_tables(folder / "again"))
    attempt.commit({})
    load_stage("shards").run(recipe, work)
    return Setting(recipe, work.stage_dir("shards"), STEPS, threads=1)


def test_gate_holds_for_equal_adapters(setting: Setting) -> None:
    loss, gradient = train_step.differences(setting)
    assert loss <= train_step.LOSS_TOLERANCE
    assert gradient <= train_step.GRADIENT_TOLERANCE


def test_gate_fails_for_other_adapters(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    differences = train_step.differences
    monkeypatch.setattr(train_step, "differences", lambda s: differences(s, factor=1.5))
    page = Report("t")
    train_step.check(page, setting)
    assert len(page.failures) == 2


def test_prompts_without_slots_hold_the_same_words(setting: Setting) -> None:
    prompts = Prompts(setting)
    with_slots, without = prompts.step(0, slots=True), prompts.step(0, slots=False)
    words = 0
    for batch, short in zip(with_slots, without, strict=True):
        for sample, shorter in zip(batch, short, strict=True):
            slots = sample.tokens[1] >= 0
            assert slots.any()
            assert np.array_equal(sample.tokens[0, ~slots], shorter.tokens[0])
            assert shorter.tokens[2, -1] == sample.label, "the last position asks for the answer"
            words += int((~slots).sum())
    assert prompts.words(0) == words


def test_trainer_example_has_the_answer_as_its_only_label(setting: Setting) -> None:
    sample = Prompts(setting).step(0, slots=False)[0][0]
    made = train_step_arms.features(sample, 7)
    assert made["input_ids"] == [*sample.tokens[0].tolist(), 7]
    assert [label for label in made["labels"] if label != train_step_arms.IGNORED] == [7]
    assert made["labels"][-1] == 7


@pytest.mark.parametrize("plain", [True, False])
def test_arm_waits_for_every_turn_and_learns(setting: Setting, plain: bool) -> None:
    mine, theirs = multiprocessing.Pipe()
    outcome = []

    def arm(link: Connection) -> None:
        turns = Turns(link)
        train_step_arms.run_ours(setting, turns, plain=plain)
        outcome.append(turns.outcome())

    worker = threading.Thread(target=arm, args=(theirs,), daemon=True)
    worker.start()
    for _ in range(STEPS + 1):
        assert mine.poll(60), "the arm never asked for its turn"
        mine.recv()
        assert not mine.poll(0.05), "the arm went on before its turn"
        mine.send(None)
    worker.join(60)
    (found,) = outcome
    assert isinstance(found, Outcome)
    assert len(found.busy) == STEPS
    assert 0 < found.loss < 3


def test_speedup_pairs_steps_of_the_same_samples() -> None:
    nothing = Outcome(0, 0, 0.0, [])
    timings = {
        "trainer": train_step.Timing([2.0, 8.0, 3.0], [], nothing),
        "rellax": train_step.Timing([1.0, 2.0, 3.0], [], nothing),
    }
    assert train_step.speedup(timings, "rellax") == 2.0

"""Checkpoints: exact, whole or absent, and never trusted unread."""

from __future__ import annotations

import random
import resource
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from rellax_ds.engine import elastic
from rellax_ds.engine.checkpoint import (
    LATEST,
    TENSORS,
    CheckpointStore,
    fault,
    newest_valid,
    open_checkpoint,
)
from rellax_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.engine.engine import Engine
    from rellax_ds.engine.processes import Processes

    Step = Callable[[Engine, int], float]


@pytest.fixture
def store(tmp_path: Path, processes: Processes) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", processes, keep_last=2)


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, processes: Processes, module_engine: Engine
) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"w" * 100)
    store = CheckpointStore(folder, processes, keep_last=2)
    for step in (1, 2):
        store.save(module_engine, step, {"step": step}, {"adapter": adapter})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def test_restored_engine_takes_the_same_steps_to_the_bit(
    make_engine: Callable[[], Engine], step: Step, tmp_path: Path
) -> None:
    engine = make_engine()
    for number in range(3):
        step(engine, number)
    elastic.write(tmp_path / TENSORS, *elastic.capture(engine))
    losses = [step(engine, number) for number in range(3, 6)]
    resumed = make_engine()
    elastic.restore(resumed, tmp_path / TENSORS)
    rates = [group["lr"] for group in resumed.deepspeed.optimizer.param_groups]
    assert rates == pytest.approx([0.05 * 0.81, 0.2 * 0.81])
    assert [step(resumed, number) for number in range(3, 6)] == losses
    ours, theirs = elastic.capture(engine), elastic.capture(resumed)
    assert ours[1] == theirs[1]
    assert ours[1]["groups"]["outer"]["step"] == 6
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])


def test_restored_groups_keep_their_own_step_counters(
    make_engine: Callable[[], Engine], step: Step, tmp_path: Path
) -> None:
    engine = make_engine()
    elastic.write(tmp_path / TENSORS, *elastic.capture(engine))
    resumed = make_engine()
    elastic.restore(resumed, tmp_path / TENSORS)
    step(resumed, 0)
    groups = elastic.capture(resumed)[1]["groups"]
    assert {name: group["step"] for name, group in groups.items()} == {"inner": 1, "outer": 1}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "inner": 0.1,
        "outer": 0.0,
    }


def test_checkpoint_of_another_model_is_refused_by_the_tensor_name(
    module_engine: Engine, tmp_path: Path
) -> None:
    tensors, facts = elastic.capture(module_engine)
    tensors["param/renamed"] = tensors.pop("param/inner.weight")
    elastic.write(tmp_path / TENSORS, tensors, facts)
    with pytest.raises(CheckpointError, match=r"lacks 'param/inner\.weight'"):
        elastic.restore(module_engine, tmp_path / TENSORS)


def test_every_flipped_bit_of_a_checkpoint_is_found(copied: Path) -> None:
    newest = copied / "step-00000002"
    assert fault(newest) is None
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    generator = random.Random(11)
    for _ in range(300):
        path = generator.choice(files)
        whole = path.read_bytes()
        place = generator.randrange(len(whole))
        bit = 1 << generator.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        assert fault(newest) is not None, f"{path.name} at {place}, bit {bit}"
        path.write_bytes(whole)


def test_torn_checkpoint_is_passed_over_with_one_line_and_latest_is_not_needed(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torn = copied / "step-00000002" / TENSORS
    torn.write_bytes(torn.read_bytes()[:8])
    (copied / LATEST).write_text("")
    found = newest_valid(copied)
    assert found is not None
    assert (found.step, found.state) == (1, {"step": 1})
    assert [record.message for record in caplog.records] == [
        f"checkpoint step-00000002 passed over: {TENSORS} has 8 bytes instead of "
        f"{(copied / 'step-00000001' / TENSORS).stat().st_size}"
    ]
    with pytest.raises(CheckpointError, match="has 8 bytes instead of"):
        open_checkpoint(copied / "step-00000002")
    (copied / "step-00000001" / "manifest.json").unlink()
    assert newest_valid(copied) is None


def test_choice_never_starts_over_and_leftovers_of_kills_are_swept(
    copied: Path, processes: Processes
) -> None:
    for leftover in (".staging-3-0", ".trash-step-00000000-1"):
        (copied / leftover).mkdir()
    store = CheckpointStore(copied, processes, keep_last=2)
    assert store.choose("never") is None
    assert {path.name for path in copied.iterdir()} == {"step-00000001", "step-00000002", LATEST}
    chosen = store.choose("auto")
    assert chosen is not None
    assert chosen.step == 2
    chosen = store.choose(str(copied / "step-00000001"))
    assert chosen is not None
    assert chosen.step == 1
    assert newest_valid(copied) == chosen, "the run would jump back to the abandoned step 2"


def test_retention_keeps_the_newest_and_the_best(
    store: CheckpointStore, module_engine: Engine
) -> None:
    for step in range(1, 6):
        store.save(module_engine, step, {}, {}, best_step=2)
    names = sorted(path.name for path in store.directory.glob("step-*"))
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    assert (store.directory / LATEST).read_text() == "step-00000005\n"


def test_full_disk_costs_a_checkpoint_and_only_the_third_in_a_row_ends_training(
    store: CheckpointStore, module_engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.save(module_engine, 1, {}, {}) is not None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        assert store.save(module_engine, 2, {}, {}) is None
        assert store.save(module_engine, 3, {}, {}) is None
        with pytest.raises(CheckpointError, match="3 failures in a row"):
            store.save(module_engine, 4, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint at step 2 was not written" in caplog.text
    assert {path.name for path in store.directory.iterdir()} == {"step-00000001", LATEST}
    assert newest_valid(store.directory) is not None

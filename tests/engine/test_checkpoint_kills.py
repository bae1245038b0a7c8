"""Checkpoints under SIGKILL and on a full file system: real processes, real kills, a real disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rellax_ds.engine import elastic
from rellax_ds.engine.checkpoint import (
    LATEST,
    TENSORS,
    CheckpointStore,
    fault,
    newest_valid,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rellax_ds.engine.engine import Engine
    from rellax_ds.engine.processes import Processes

KEEP_LAST = 2
POINTS_AT_LEAST = 20
CRASHES = 15
BEST = 1


@pytest.fixture
def store(
    tmp_path: Path,
    processes: Processes,
    module_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> CheckpointStore:
    """A store that holds steps 1 (the best), 2 and 3; what it saves is gathered here, since a
    forked child cannot.
    """
    gathered = elastic.capture(module_engine)
    monkeypatch.setattr(elastic, "capture", lambda _engine: gathered)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"w" * 100)
    made = CheckpointStore(tmp_path / "checkpoints", processes, KEEP_LAST)
    for step in (1, 2, 3):
        save(made, module_engine, step)
    return made


def save(store: CheckpointStore, engine: Engine, step: int) -> None:
    folders = {"adapter": store.directory.parent / "adapter"}
    store.save(engine, step, {"step": step}, folders, best_step=BEST)


def killed_at(store: CheckpointStore, engine: Engine, step: int, point: int) -> bool:
    """Save in a child that SIGKILLs itself before its `point`-th operation on a file of the store.

    Returns:
        Whether it was killed; False when the save was over before.
    """
    child = os.fork()
    if child == 0:
        inside, left = str(store.directory), point

        def count(path: object) -> None:
            nonlocal left
            left -= isinstance(path, (str, os.PathLike)) and str(path).startswith(inside)
            if left == 0:
                left = -1  # the kill itself is an event, too
                os.kill(os.getpid(), signal.SIGKILL)

        sync = os.fsync

        def fsync(handle: int) -> None:
            count(Path(f"/proc/self/fd/{handle}").readlink())
            sync(handle)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" or event.startswith("os."):
                count(arguments[0] if arguments else None)

        os.fsync = fsync
        sys.addaudithook(audit)
        status = 1
        try:
            save(store, engine, step)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def entries(store: CheckpointStore) -> list[str]:
    """Folders that take the space of a checkpoint, whole or not."""
    return sorted(path.name for path in store.directory.iterdir() if path.is_dir())


def test_save_killed_at_every_file_operation_leaves_a_checkpoint_to_continue_from(
    store: CheckpointStore, module_engine: Engine, tmp_path: Path
) -> None:
    before = tmp_path / "before"
    shutil.copytree(store.directory, before)
    point, chosen = 1, []
    while killed_at(store, module_engine, 4, point):
        assert len(entries(store)) <= KEEP_LAST + 2, f"at {point}: {entries(store)}"
        found = store.choose("auto")
        assert found is not None, f"killed at {point}"
        assert found.state == {"step": found.step}
        assert not [path for path in store.directory.glob(".*") if path.is_dir()]
        chosen.append(found.step)
        shutil.rmtree(store.directory)
        shutil.copytree(before, store.directory)
        point += 1
    assert len(chosen) >= POINTS_AT_LEAST
    assert chosen == sorted(chosen), "a later kill lost more than an earlier one"
    assert set(chosen) == {3, 4}


def test_retention_under_crashes_keeps_a_valid_checkpoint_and_bounds_the_disk(
    store: CheckpointStore, module_engine: Engine
) -> None:
    generator = random.Random(5)
    newest = 3
    for _ in range(CRASHES):
        killed_at(store, module_engine, newest + 1, generator.randrange(1, 90))
        assert len(entries(store)) <= KEEP_LAST + 2, entries(store)
        found = store.choose("auto")
        assert found is not None
        assert found.step >= newest
        newest = found.step
    assert newest > 3, "no save was ever published"
    save(store, module_engine, newest + 1)
    assert entries(store) == sorted(f"step-{s:08d}" for s in (BEST, newest, newest + 1))


@pytest.mark.parametrize("pointer", [None, b"", b"step-000", b"step-00000099\n", b"\xff\x00"])
def test_pointer_that_is_absent_torn_or_wrong_changes_nothing(
    store: CheckpointStore, pointer: bytes | None
) -> None:
    (store.directory / LATEST).unlink()
    if pointer is not None:
        (store.directory / LATEST).write_bytes(pointer)
    chosen = store.choose("auto")
    assert chosen is not None
    assert chosen.step == 3


def test_checkpoint_without_its_tensors_is_passed_over_with_one_line(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    (store.directory / "step-00000003" / TENSORS).unlink()
    chosen = store.choose("auto")
    assert chosen is not None
    assert chosen.step == 2
    assert [record.message for record in caplog.records] == [
        f"checkpoint step-00000003 passed over: {TENSORS} is missing"
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_file_system_costs_a_checkpoint_and_names_path_and_bytes(
    small_disk: Path,
    processes: Processes,
    module_engine: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = CheckpointStore(small_disk / "checkpoints", processes, KEEP_LAST)
    assert store.save(module_engine, 1, {}, {}) is not None
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(b"0" * 65536)
    assert store.save(module_engine, 2, {}, {}) is None
    assert f"{store.directory} has 0 bytes free, a checkpoint needs " in caplog.text
    os.truncate(ballast, ballast.stat().st_size - 8192)  # enough at first sight, not for all files
    assert store.save(module_engine, 2, {}, {}) is None
    assert f"{store.directory}/.staging-2-0" in caplog.text
    assert "No space left on device" in caplog.text
    assert entries(store) == ["step-00000001"]
    assert fault(store.directory / "step-00000001") is None
    ballast.unlink()
    assert store.save(module_engine, 2, {}, {}) is not None
    found = newest_valid(store.directory)
    assert found is not None
    assert found.step == 2

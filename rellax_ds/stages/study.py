"""Running a study: every run in a work folder of its own, every shared stage once.

A stage is built in `stages/STAGE-KEY/`, a work folder named by the digest of everything the output
depends on, and the runs hold links to what lies there. Runs that agree on a key therefore meet in
one folder, whichever comes first: the others find the artefact committed, and what a killed run
left half done (partitions, checkpoints) is taken up by the next that needs it. A lock on the folder
makes a second process wait instead of building the same again.

Each run is a process of its own, so that memory comes back, and a run that is killed or breaks is
one failed run and not the end of the study.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from typing import TYPE_CHECKING

import yaml

from rellax_ds import runtime
from rellax_ds.artifacts import STAGES, Manifest, WorkDir, write_bytes
from rellax_ds.config import digest
from rellax_ds.errors import ArtifactError, RellaxError
from rellax_ds.redaction import redact, redacted
from rellax_ds.stages.pipeline import load_stage, run_stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from rellax_ds.config import Recipe
    from rellax_ds.stages.launchers import Launched, Launcher
    from rellax_ds.study import Run

RUN_STAGES = STAGES[: STAGES.index("predict") + 1]
"""What a run of a study consists of: the report is the study's own."""

STORE = "stages"
"""Folder, in a study's folder, of the artefacts that runs share."""

FAILURE = "failure.txt"
"""In a run's folder: one line on why its last attempt failed."""

_LOCK = ".lock"
_POLL_SECONDS = 0.1


def run_shared(name: str, recipe: Recipe, work: WorkDir, store: Path) -> Manifest:
    """Give a run's work folder the artefact of a stage, building it in the store if nobody has.

    Args:
        name: One of the eight stages; the stages before it are in `work`.
        recipe: The run's recipe.
        work: The run's folder.
        store: Folder of the shared artefacts.

    Raises:
        RellaxError: The stage cannot be run.
    """
    place = WorkDir(store / f"{name}-{digest(load_stage(name).parts(recipe, work))[:16]}")
    place.root.mkdir(parents=True, exist_ok=True)
    with _alone(place.root):
        for earlier in STAGES[: STAGES.index(name)]:
            if work.manifest(earlier) is not None:
                _link(place.stage_dir(earlier), work.stage_dir(earlier).resolve())
        manifest = run_stage(name, recipe, place)
    _link(work.stage_dir(name), place.stage_dir(name))
    return manifest


def run_one(run: Run, root: Path) -> None:
    """Run one run of a study in this process, up to its predictions.

    Args:
        run: The run.
        root: The study's folder.

    Raises:
        RellaxError: A stage failed; the run's folder says so in `FAILURE`, in one line.
    """
    work = run.work(root)
    work.root.mkdir(parents=True, exist_ok=True)
    document = redacted(run.recipe.model_dump(mode="json"))
    write_bytes(work.root / "recipe.yaml", yaml.safe_dump(document, sort_keys=False).encode())
    failure = work.root / FAILURE
    failure.unlink(missing_ok=True)
    try:
        for name in RUN_STAGES:
            run_shared(name, run.recipe, work, root / STORE)
    except Exception as error:
        kind = "" if isinstance(error, RellaxError) else f"{type(error).__name__}: "
        write_bytes(failure, redact(" ".join(f"{kind}{error}".split())).encode() + b"\n")
        raise


def is_finished(run: Run, root: Path) -> bool:
    """Whether all stages of a run are committed for the recipe it has now."""
    work = run.work(root)
    try:
        for name in RUN_STAGES:
            if work.open(name, load_stage(name).parts(run.recipe, work), {}).committed() is None:
                return False
    except RellaxError:  # of a run of its own, which says it again
        return False
    return not (work.root / FAILURE).exists()


def run_all(
    runs: Sequence[Run],
    root: Path,
    arguments: Sequence[str],
    launcher: Launcher,
    parallel: int = 1,
) -> dict[str, str]:
    """Run runs, each in a process of its own.

    Args:
        runs: Those that are not finished, sources of adapters first.
        root: The study's folder.
        arguments: Arguments of the `rellax` command that runs one run, its name left out.
        launcher: What starts them, and where.
        parallel: Runs at a time.

    Returns:
        Why runs failed, one line each, by name.

    Raises:
        SystemExit: The study was asked to stop (status 143); the runs it was in have left.
    """
    waiting = list(runs)
    runtime.logger.info("study: %d runs to do", len(waiting))
    failures: dict[str, str] = {}
    active: dict[str, Launched] = {}
    with _signals() as asked:
        passed_on = 0
        while active or (waiting and not asked):
            for run in [] if asked else _startable(waiting, active, failures):
                if len(active) == parallel:
                    break
                waiting.remove(run)
                runtime.logger.info("study: %s is launched, %d wait", run.name, len(waiting))
                (run.work(root).root / FAILURE).unlink(missing_ok=True)
                command = ["-m", "rellax_ds.cli", *arguments, run.name]
                active[run.name] = launcher.start(run, command)
            _skip_orphans(waiting, failures)
            time.sleep(_POLL_SECONDS)
            for number in asked[passed_on:]:
                passed_on += 1
                if number == signal.SIGTERM or not launcher.hears_interrupt:
                    for launched in active.values():
                        launched.terminate()
            for name, launched in list(active.items()):
                ended = launched.poll()
                if ended is not None:
                    del active[name]
                    if ended and not asked:
                        failures[name] = _reason(root, name, runs, ended)
                        runtime.logger.error("study: %s failed: %s", name, failures[name])
    if asked:
        from rellax_ds.training.signals import EXIT_STOPPED

        raise SystemExit(EXIT_STOPPED)
    return failures


def _startable(
    waiting: Sequence[Run], active: dict[str, Launched], failures: dict[str, str]
) -> list[Run]:
    """Waiting runs whose source, if they have one, has ended well."""
    unready = {run.name for run in waiting} | set(active) | set(failures)
    return [run for run in waiting if run.start_from not in unready]


def _skip_orphans(waiting: list[Run], failures: dict[str, str]) -> None:
    """Give up the runs whose source has failed."""
    for run in [run for run in waiting if run.start_from in failures]:
        waiting.remove(run)
        failures[run.name] = f"it starts from {run.start_from}, which failed"
        runtime.logger.error("study: %s is not run: %s", run.name, failures[run.name])


def _reason(root: Path, name: str, runs: Sequence[Run], ended: str) -> str:
    """One line on a failed run: what it left, or how it ended."""
    (run,) = (run for run in runs if run.name == name)
    with contextlib.suppress(OSError):
        return (run.work(root).root / FAILURE).read_text(encoding="utf-8").strip()
    return f"{ended}; run the same command to continue it"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list of the SIGTERM and SIGINT that this process has got, in order."""
    asked: list[int] = []

    def hear(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder of the store; another process that wants it waits."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            _lock(handle, folder)
        except OSError:  # NFS locks files, and only those that are open for writing
            os.close(handle)
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(handle, folder)
            except OSError:
                runtime.logger.debug("study: no locks on %s", folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        runtime.logger.info("study: another run works in %s; waiting for it", folder)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _link(link: Path, target: Path) -> None:
    """Make `link` lead to `target`, whatever it led to before, by one rename.

    Raises:
        ArtifactError: Something that is no link stands there.
    """
    if link.exists() and not link.is_symlink():
        raise ArtifactError(
            f"{link}: not a link into the study's store, so another command has written it; "
            "move it away and run the study again"
        )
    link.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and str(link.readlink()) == relative:
        return
    staged = link.with_name(f".{link.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    staged.symlink_to(relative)
    staged.replace(link)

"""WorkDir, Manifest and the atomic commit: an artefact is whole or absent.

A stage builds its files in `.running/STAGE-KEY/` beside the finished artefacts; `commit` hashes
them, writes the manifest and publishes the folder by one rename. The key is a digest of everything
the output depends on: the stage's code version, the recipe sections it reads and the content
digests of its inputs. A manifest whose key still matches makes the stage a no-op; one that does not
says which part changed. The same folder is found again after a kill, so committed partitions in it
are reused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.config import digest
from rellax_ds.errors import ArtifactError
from rellax_ds.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

STAGES = ("tables", "embeddings", "retrieval", "crm", "shards", "train", "predict", "report")
"""The eight stages in order; a stage's folder is its number and name."""

MANIFEST = "manifest.json"
_SPENT = ".spent.json"


@dataclass(frozen=True)
class Manifest:
    """What a stage wrote and from what.

    Attributes:
        stage: One of `STAGES`.
        key: Digest of `parts`; equal keys mean equal outputs.
        parts: What the key was made of: code version, digest per recipe section, content digest per
            input stage.
        files: Relative path to size in bytes and sha256.
        content: Digest of `files`, the identity downstream stages depend on.
        counts: Row counts and other figures worth a line in the report.
        versions: Python and library versions.
        commit: Source commit, if the code ran from a checkout.
        seconds: Wall-clock time of the run that committed it.
        peak_memory_bytes: Largest resident size of the driving process.
        recipe: The whole recipe, as it was, with secrets masked.
    """

    stage: str
    key: str
    parts: dict[str, str]
    files: dict[str, dict[str, Any]]
    content: str
    counts: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    seconds: float
    peak_memory_bytes: int
    recipe: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, or None when there is none that parses."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class WorkDir:
    """Folder of one run: the eight artefact folders and `.running`."""

    def __init__(self, root: Path) -> None:
        """Name the folder; nothing is created until a stage runs."""
        self.root = root.expanduser().resolve()

    def stage_dir(self, stage: str) -> Path:
        """Folder of a stage's artefact, for example `3_retrieval`."""
        return self.root / f"{STAGES.index(stage) + 1}_{stage}"

    def manifest(self, stage: str) -> Manifest | None:
        """Manifest of a committed stage, or None."""
        return Manifest.read(self.stage_dir(stage) / MANIFEST)

    def require(self, stage: str) -> Manifest:
        """Manifest of a committed stage.

        Raises:
            ArtifactError: The stage has not been run in this folder.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            folder = self.stage_dir(stage)
            raise ArtifactError(
                f"{folder}: stage '{stage}' has not been committed; run `rellax {stage}` first"
            )
        return manifest

    def check(self, stage: str) -> None:
        """Check that a committed stage's files are there with the sizes its manifest gives.

        Raises:
            ArtifactError: One is missing or has another size.
        """
        folder = self.stage_dir(stage)
        for name, facts in self.require(stage).files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != facts["bytes"]:
                size = "missing" if found is None else f"{found} bytes"
                raise ArtifactError(
                    f"{path}: {size}, manifest says {facts['bytes']}; run `rellax {stage}` again"
                )

    def open(self, stage: str, parts: Mapping[str, str], recipe: Mapping[str, Any]) -> StageRun:
        """Prepare to run a stage whose output depends on `parts` only."""
        return StageRun(self, stage, dict(parts), dict(recipe))


@dataclass
class StageRun:
    """One stage about to run: says whether it must, holds its running folder, commits it."""

    work: WorkDir
    stage: str
    parts: dict[str, str]
    recipe: dict[str, Any]
    _start: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> str:
        """Digest of everything the output depends on."""
        return digest(self.parts)

    @property
    def directory(self) -> Path:
        """Folder the stage writes into before the commit; kept between attempts with the same
        key.
        """
        return (
            self.work.root
            / ".running"
            / f"{STAGES.index(self.stage) + 1}_{self.stage}-{self.key[:12]}"
        )

    def committed(self) -> Manifest | None:
        """The committed manifest if its key matches and its files are all there with their sizes,
        else None.
        """
        manifest = self.work.manifest(self.stage)
        if manifest is None or manifest.key != self.key:
            return None
        folder = self.work.stage_dir(self.stage)
        _delete_spent(folder)
        for name, facts in manifest.files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                runtime.logger.warning(
                    "%s: %s is missing or has another size; the stage runs again", self.stage, path
                )
                return None
        return manifest

    def changes(self) -> list[str]:
        """Names of the parts that differ from the committed manifest; empty when there is none."""
        manifest = self.work.manifest(self.stage)
        if manifest is None:
            return []
        names = sorted(set(manifest.parts) | set(self.parts))
        return [name for name in names if manifest.parts.get(name) != self.parts.get(name)]

    def begin(self, keep_others: bool = False) -> Path:
        """Create the running folder and start the clock.

        Args:
            keep_others: Leave what interrupted attempts with another key left, until the commit;
                otherwise it is dropped now.
        """
        self._start = time.monotonic()
        running = self.directory
        running.mkdir(parents=True, exist_ok=True)
        if not keep_others:
            self._drop_others()
        return running

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the running folder: a second process with the same key waits for the first.

        The lock is the folder's own, so it goes with the process that held it. When the wait is
        over the other process may have committed: look at `committed` again. A file system without
        locks on folders (NFS) leaves it to the partitions' own first-wins commit.
        """
        while True:
            running = self.directory
            running.mkdir(parents=True, exist_ok=True)
            handle = os.open(running, os.O_RDONLY)
            try:
                self._lock(handle)
                published = not running.exists() or not os.path.samestat(
                    os.fstat(handle), running.stat()
                )
                if not published or self.committed() is not None:
                    yield
                    return
            finally:
                with contextlib.suppress(OSError):  # what the wait has made and nobody filled
                    running.rmdir()
                    running.parent.rmdir()
                os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            runtime.logger.info(
                "%s: another process works in %s; waiting for it", self.stage, self.directory
            )
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            runtime.logger.debug("%s: no locks on %s", self.stage, self.directory)

    def commit(self, counts: Mapping[str, Any]) -> Manifest:
        """Hash the files, write the manifest and publish the folder by rename.

        Args:
            counts: Row counts and figures for the manifest.

        Returns:
            The committed manifest.

        Raises:
            ArtifactError: The running folder holds no file.
        """
        running, target = self.directory, self.work.stage_dir(self.stage)
        _delete_unfinished(running)
        aside = {running / name for name in (*_spent(running), MANIFEST, _SPENT)}
        paths = sorted(p for p in running.rglob("*") if p.is_file() and p not in aside)
        if not paths:
            raise ArtifactError(f"{running}: stage '{self.stage}' wrote no file; nothing to commit")
        files = {
            str(p.relative_to(running)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)}
            for p in paths
        }
        for path in paths:
            fsync(path)
        manifest = Manifest(
            stage=self.stage,
            key=self.key,
            parts=self.parts,
            files=files,
            content=digest({name: facts["sha256"] for name, facts in files.items()}),
            counts=dict(counts),
            versions=runtime.versions(),
            commit=runtime.source_commit(),
            seconds=round(time.monotonic() - self._start, 3),
            peak_memory_bytes=runtime.peak_memory_bytes(),
            recipe=redacted(self.recipe),
        )
        write_json(running / MANIFEST, asdict(manifest))
        fsync(running)
        replaced = running.with_name(f"replaced-{target.name}-{os.getpid()}")
        if target.exists():
            target.rename(replaced)
        running.rename(target)
        fsync(target.parent)
        _delete_spent(target)
        for old in running.parent.glob(f"replaced-{target.name}-*"):
            shutil.rmtree(old, ignore_errors=True)
        self._drop_others()
        with contextlib.suppress(OSError):
            running.parent.rmdir()
        return manifest

    def _drop_others(self) -> None:
        """Delete the running folders of this stage's attempts with another key."""
        running = self.directory
        name = f"{STAGES.index(self.stage) + 1}_{self.stage}-*"
        private = running.with_name(f".writing-{running.name}")  # see `partitions`
        for other in (*running.parent.glob(name), *running.parent.glob(f".writing-{name}")):
            if other not in {running, private}:
                shutil.rmtree(other, ignore_errors=True)


def set_aside(directory: Path, names: Iterable[str]) -> None:
    """Name files of a running folder that are no part of the artefact; the commit deletes them."""
    write_json(directory / _SPENT, sorted({*_spent(directory), *names}))


def _spent(directory: Path) -> list[str]:
    try:
        names = json.loads((directory / _SPENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(name) for name in names]


def _delete_spent(directory: Path) -> None:
    """Delete what `set_aside` named; the list goes last, so that a kill in between is made good."""
    names = _spent(directory)
    for name in names:
        (directory / name).unlink(missing_ok=True)
    if names:
        (directory / _SPENT).unlink(missing_ok=True)


def _delete_unfinished(directory: Path) -> None:
    """Delete hidden files and folders: whoever writes under a temporary name starts it with a dot,
    and a kill leaves it behind.
    """
    for path in list(directory.rglob(".*")):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _SPENT:
            path.unlink(missing_ok=True)


def out_of_space(error: BaseException, folder: Path) -> ArtifactError | None:
    """The one line to raise when `error` says that a disk or a quota is full, else None.

    Libraries wrap the system's error in their own, some without its number; NumPy reports a short
    write.
    """
    text = " ".join(str(error).split())
    numbers = {
        errno.ENOSPC: "no space left",
        errno.EDQUOT: "quota used up",
        errno.EFBIG: "file too large",
    }
    found = numbers.get(getattr(error, "errno", None) or 0)
    if found is None:
        found = next((f for n, f in numbers.items() if os.strerror(n) in text), None)
    if found is None and re.fullmatch(r"\d+ requested and \d+ written", text):
        found = "no space left"
    if found is None:
        return None
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return ArtifactError(
        f"{folder}: {found} ({free} bytes are free): {text}; make room and run the same command "
        "again, what is committed is kept"
    )


def write_json(path: Path, value: object) -> None:
    """Write a JSON document through a temporary name, fsync and rename: a reader sees the old file
    or the new.
    """
    write_bytes(
        path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    )


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through a temporary name, fsync and rename."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

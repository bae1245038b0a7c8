"""Partitions: committed once by whoever is first, reused after a kill, redone when damaged, in the
partitions' order.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rellax_ds.artifacts import WorkDir, set_aside
from rellax_ds.errors import ArtifactError, ConfigError, TableError
from rellax_ds.partitions import (
    Partition,
    connect,
    drop_records,
    private_folder,
    process,
    read_record,
    run_partitions,
    split_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Square:
    """Writes the squares of its rows; fails in the way its settings say, for the tests below."""

    def __init__(self, failure: str = "none", marker: str = "") -> None:
        self.failure, self.marker = failure, Path(marker)
        if failure == "constructor":
            raise TableError("no such table; write it")

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        first = partition.payload["start"] == 0
        if first and self.failure == "table":
            raise TableError("row 0 is wrong; mend it")
        if self.failure == "all":
            raise ZeroDivisionError("a defect everywhere")
        if first and self.failure == "bug":
            raise ZeroDivisionError("a defect")
        if first and self.failure == "once" and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        if first and self.failure == "witness":
            self.marker.write_text(" ".join(p.name for p in directory.parent.iterdir()))
        if first and self.failure == "io" and not self.marker.exists():
            self.marker.touch()
            raise OSError("disk hiccup")
        rows = range(partition.payload["start"], partition.payload["stop"])
        (directory / f"{partition.name}.txt").write_text(" ".join(str(i * i) for i in rows))
        return {"rows": len(rows)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    connect()
    yield
    ray.shutdown()


def test_split_rows_covers_every_row_once() -> None:
    spans = [(p.payload["start"], p.payload["stop"]) for p in split_rows(10, 4)]
    assert spans == [(0, 4), (4, 8), (8, 10)]


def test_process_commits_the_record_last_and_leaves_no_private_folder(tmp_path: Path) -> None:
    process(Square(), Partition("part-00000", {"start": 0, "stop": 3}), tmp_path, "k")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "part-00000.committed.json",
        "part-00000.txt",
    ]
    record = read_record(tmp_path, "part-00000", "k")
    assert record is not None
    assert record.reused
    assert read_record(tmp_path, "part-00000", "other key") is None


def test_record_with_a_flipped_bit_is_not_reused(tmp_path: Path) -> None:
    process(Square(), Partition("part-00000", {"start": 0, "stop": 3}), tmp_path, "k")
    data = bytearray((tmp_path / "part-00000.txt").read_bytes())
    data[0] ^= 1
    (tmp_path / "part-00000.txt").write_bytes(bytes(data))
    assert read_record(tmp_path, "part-00000", "k") is None


def test_process_refuses_files_not_named_after_the_partition(tmp_path: Path) -> None:
    def worker(partition: Partition, directory: Path) -> dict[str, Any]:
        (directory / "other.txt").write_text("x")
        return {}

    with pytest.raises(ArtifactError, match=r"other\.txt"):
        process(worker, Partition("part-00000", {}), tmp_path, "k")
    assert list(tmp_path.iterdir()) == []


PART = Partition("part-00000", {"start": 0, "stop": 3})


def identity(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: equal only if nothing was written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_process_of_a_committed_partition_does_not_compute(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = process(Square(), PART, out, "k")
    again = process(Square("bug"), PART, out, "k")
    assert again.reused
    assert again.files == first.files


def test_process_beaten_by_another_attempt_leaves_its_files_and_takes_its_record(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    standing = {}

    def late(partition: Partition, directory: Path) -> dict[str, Any]:
        counts = Square()(partition, directory)
        process(Square(), partition, out, "k")  # another driver's worker is faster
        standing.update(identity(out))
        return counts

    record = process(late, PART, out, "k")
    assert record.reused
    assert identity(out) == standing
    assert not list((tmp_path / ".writing-out").iterdir())


def test_process_finding_files_of_a_torn_attempt_makes_them_whole(tmp_path: Path) -> None:
    whole = process(Square(), PART, tmp_path / "a", "k")
    out = tmp_path / "b"
    out.mkdir()
    (out / "part-00000.txt").write_text("0 1")
    assert process(Square(), PART, out, "k").files == whole.files
    assert read_record(out, PART.name, "k") is not None


def test_process_record_of_another_key_is_replaced(tmp_path: Path) -> None:
    process(Square(), PART, tmp_path, "old")
    process(Square(), PART, tmp_path, "new")
    assert read_record(tmp_path, PART.name, "old") is None
    assert read_record(tmp_path, PART.name, "new") is not None


def test_process_on_a_full_disk_says_so_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def large(partition: Partition, directory: Path) -> dict[str, Any]:
        with (directory / f"{partition.name}.bin").open("wb") as file:
            for _ in range(64):
                file.write(bytes(4096))
        return {}

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(ArtifactError, match=r"bytes are free.*part-00000 needs more") as caught:
            process(large, PART, tmp_path / "out", "k")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert str(tmp_path / "out") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not process(large, PART, tmp_path / "out", "k").reused


def test_process_gives_up_on_a_partition_that_kills_its_workers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for n in range(10):
        assert read_record(out, PART.name, "k") is None
        (private_folder(out) / f"{PART.name}@host@1@{n}").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"part-00000 took 10 workers down"):
        process(Square(), PART, out, "k")


@pytest.mark.parametrize("files", [False, True])
def test_drop_records_are_kept_until_the_commit_and_no_part_of_it(
    tmp_path: Path, files: bool
) -> None:
    work = WorkDir(tmp_path)
    directory = work.open("shards", {"s": "1"}, {}).begin()
    record = process(Square(), PART, directory, "k")
    (directory / "merged").write_text("0 1 4")
    drop_records(directory, [record], files)
    assert process(
        Square("bug"), PART, directory, "k"
    ).reused  # killed before the commit, run again
    drop_records(directory, [record], files)
    manifest = work.open("shards", {"s": "1"}, {}).commit({})
    expected = {"merged"} if files else {"merged", "part-00000.txt"}
    assert set(manifest.files) == expected
    folder = work.stage_dir("shards")
    assert {p.name for p in folder.iterdir()} == expected | {"manifest.json"}
    # Killed after the commit, before all was deleted:
    (folder / "part-00000.committed.json").write_text("{}")
    set_aside(folder, ["part-00000.committed.json"])
    assert work.open("shards", {"s": "1"}, {}).committed() == manifest
    assert {p.name for p in folder.iterdir()} == expected | {"manifest.json"}


@pytest.mark.ray
def test_run_partitions_clears_what_the_dead_left_in_private(cluster: None, tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    here, out = platform.node(), tmp_path / "out"
    left = [private_folder(out) / f"part-00009@{here}@{pid}@a" for pid in (child.pid, os.getpid())]
    for folder in left:
        folder.mkdir(parents=True)
    settings = {"failure": "witness", "marker": str(tmp_path / "seen")}
    run_partitions("square", split_rows(10, 3), Square, settings, out, "k")
    seen = (tmp_path / "seen").read_text().split()
    assert left[0].name not in seen
    assert left[1].name in seen
    assert not private_folder(out).exists()


@pytest.mark.ray
def test_run_partitions_failing_on_every_actor_says_it_once(
    cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArtifactError, match="a defect everywhere"):
        run_partitions("square", split_rows(8, 2), Square, {"failure": "all"}, tmp_path, "k")
    for _ in range(2):  # Ray reports an error nobody asked for when its reference is collected
        gc.collect()
        time.sleep(0.5)
    assert "a defect everywhere" not in caplog.text


@pytest.mark.ray
def test_run_partitions_constructor_error_reaches_the_user_as_it_is(
    cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match="no such table"):
        run_partitions(
            "square", split_rows(4, 2), Square, {"failure": "constructor"}, tmp_path, "k"
        )


@pytest.mark.ray
def test_run_partitions_without_the_gpu_it_needs_is_refused_at_once(
    cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs 1 GPU and this machine has none"):
        run_partitions("square", split_rows(4, 2), Square, {}, tmp_path, "k", num_gpus=1.0)


@pytest.mark.ray
@pytest.mark.parametrize("failure", ["none", "once", "io"])
def test_run_partitions_survives_a_killed_actor_and_a_disk_error(
    cluster: None, tmp_path: Path, failure: str
) -> None:
    settings = {"failure": failure, "marker": str(tmp_path / "marker")}
    out = tmp_path / "out"
    records = run_partitions("square", split_rows(10, 3), Square, settings, out, "k")
    assert [r.name for r in records] == [f"part-{n:05d}" for n in range(4)]
    assert [r.counts["rows"] for r in records] == [3, 3, 3, 1]
    assert (out / "part-00001.txt").read_text() == "9 16 25"


@pytest.mark.ray
def test_run_partitions_again_computes_only_what_is_missing(cluster: None, tmp_path: Path) -> None:
    first = run_partitions("square", split_rows(10, 3), Square, {}, tmp_path, "k")
    (tmp_path / "part-00002.committed.json").unlink()
    before = (tmp_path / "part-00001.txt").stat().st_mtime_ns
    time.sleep(0.01)
    second = run_partitions("square", split_rows(10, 3), Square, {}, tmp_path, "k")
    assert [r.reused for r in second] == [True, True, False, True]
    assert [r.files for r in first] == [r.files for r in second]
    assert (tmp_path / "part-00001.txt").stat().st_mtime_ns == before


@pytest.mark.ray
def test_run_partitions_passes_a_users_error_on_and_names_the_partition_of_a_defect(
    cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match="row 0 is wrong"):
        run_partitions("square", split_rows(4, 2), Square, {"failure": "table"}, tmp_path, "k")
    with pytest.raises(ArtifactError, match="part-00000 failed: ZeroDivisionError: a defect"):
        run_partitions("square", split_rows(4, 2), Square, {"failure": "bug"}, tmp_path, "k")

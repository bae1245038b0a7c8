"""Partitions: committed once, reused after a kill, redone when damaged, in the partitions'
order.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.partitions import (
    Partition,
    _read_record,
    connect,
    drop_records,
    process,
    run_partitions,
    split_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class Square:
    """Writes the squares of its rows; fails in the way its settings say, for the tests below."""

    def __init__(self, failure: str = "none", marker: str = "") -> None:
        self.failure, self.marker = failure, Path(marker)

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        first = partition.payload["start"] == 0
        if first and self.failure == "table":
            raise TableError("row 0 is wrong; mend it")
        if first and self.failure == "bug":
            raise ZeroDivisionError("a defect")
        if first and self.failure == "once" and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
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
    record = _read_record(tmp_path, "part-00000", "k")
    assert record is not None
    assert record.reused
    assert _read_record(tmp_path, "part-00000", "other key") is None


def test_record_with_a_flipped_bit_is_not_reused(tmp_path: Path) -> None:
    process(Square(), Partition("part-00000", {"start": 0, "stop": 3}), tmp_path, "k")
    data = bytearray((tmp_path / "part-00000.txt").read_bytes())
    data[0] ^= 1
    (tmp_path / "part-00000.txt").write_bytes(bytes(data))
    assert _read_record(tmp_path, "part-00000", "k") is None


def test_process_refuses_files_not_named_after_the_partition(tmp_path: Path) -> None:
    def worker(partition: Partition, directory: Path) -> dict[str, Any]:
        (directory / "other.txt").write_text("x")
        return {}

    with pytest.raises(ArtifactError, match=r"other\.txt"):
        process(worker, Partition("part-00000", {}), tmp_path, "k")
    assert list(tmp_path.iterdir()) == []


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
    drop_records(tmp_path, second, files=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_run_partitions_passes_a_users_error_on_and_names_the_partition_of_a_defect(
    cluster: None, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match="row 0 is wrong"):
        run_partitions("square", split_rows(4, 2), Square, {"failure": "table"}, tmp_path, "k")
    with pytest.raises(ArtifactError, match="part-00000 failed: ZeroDivisionError: a defect"):
        run_partitions("square", split_rows(4, 2), Square, {"failure": "bug"}, tmp_path, "k")

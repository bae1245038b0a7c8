from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rellax_ds.artifacts import WorkDir, file_sha256, write_json
from rellax_ds.config import digest
from rellax_ds.errors import ShardError
from rellax_ds.shards.verify import verify_shards

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def files(folder: Path) -> list[Path]:
    """What a commit leaves of the folder."""
    spent = (".committed.json", ".samples.parquet")
    return [p for p in sorted(folder.iterdir()) if p.name[0] != "." and not p.name.endswith(spent)]


def test_whole_shards_are_counted_split_by_split(shards: Path) -> None:
    found = {entry.split: entry for entry in verify_shards(shards)}
    assert list(found) == ["train", "valid", "test"]
    assert (found["train"].samples, found["train"].shards) == (70, 3)
    assert found["valid"].samples == 11
    assert found["valid"].bytes == (shards / "valid-00000.tar").stat().st_size
    document = json.loads((shards / "index.json").read_text())["splits"]["test"]
    assert found["test"].tokens == pytest.approx(document["tokens_mean"] * document["rows"], abs=1)


def test_any_file_truncated_anywhere_is_found(copy: Path) -> None:
    chance = random.Random(1)
    wholes = {path: path.read_bytes() for path in files(copy)}
    for n in range(400):
        path = list(wholes)[n % len(wholes)]
        size = len(wholes[path]) - 2  # the index may lose its last line feed
        path.write_bytes(wholes[path][: chance.randrange(size)])
        with pytest.raises(ShardError):
            verify_shards(copy)
        path.write_bytes(wholes[path])
    verify_shards(copy)


def test_any_file_with_a_bit_flipped_is_found(copy: Path) -> None:
    chance = random.Random(2)
    wholes = {path: path.read_bytes() for path in files(copy)}
    stated = {
        "index.json": {
            "bytes": len(wholes[copy / "index.json"]),
            "sha256": file_sha256(copy / "index.json"),
        }
    }
    for n in range(300):
        path = list(wholes)[n % len(wholes)]
        changed = bytearray(wholes[path])
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ShardError):
            verify_shards(copy, stated)
        path.write_bytes(wholes[path])
    verify_shards(copy, stated)


def test_shard_that_is_missing_extra_or_swapped_is_found(copy: Path) -> None:
    first, second = copy / "train-00000.tar", copy / "train-00001.tar"
    shutil.copy(first, copy / "train-00009.tar")
    with pytest.raises(ShardError, match=r"train-00009\.tar: the index names no such shard"):
        verify_shards(copy)
    (copy / "train-00009.tar").unlink()
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    with pytest.raises(ShardError, match=r"train-00000\.tar, offset"):
        verify_shards(copy)
    first.unlink()
    with pytest.raises(ShardError, match=r"train-00000\.tar: no such file"):
        verify_shards(copy)


def sign(folder: Path, document: dict[str, Any]) -> None:
    """Write an index whose digests all agree with each other."""
    path = folder / "samples.parquet"
    document["samples"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    document["digest"] = digest({k: v for k, v in document.items() if k != "digest"})
    write_json(folder / "index.json", document)


@pytest.mark.parametrize("column", ["sample", "offset", "length", "crc32"])
def test_index_that_agrees_with_itself_but_not_with_the_shards_is_found(
    copy: Path, column: str
) -> None:
    document = json.loads((copy / "index.json").read_text())
    table = pq.read_table(copy / "samples.parquet")
    values = table.column(column).to_numpy().copy()
    values[[3, 4]] = values[[4, 3]] if column != "length" else values[3] + 1
    place = table.column_names.index(column)
    kind = table.schema.field(column).type
    pq.write_table(
        table.set_column(place, column, pa.array(values, kind)), copy / "samples.parquet"
    )
    sign(copy, document)
    with pytest.raises(ShardError, match=r"train-00000\.tar: holds other samples"):
        verify_shards(copy)


def test_index_of_another_set_is_found_by_the_manifest(copy: Path) -> None:
    stated = {
        "index.json": {
            "bytes": (copy / "index.json").stat().st_size,
            "sha256": file_sha256(copy / "index.json"),
        }
    }
    verify_shards(copy, stated)
    document = json.loads((copy / "index.json").read_text())
    document["answer_ids"]["yes"] += 1
    sign(copy, document)
    verify_shards(copy)
    with pytest.raises(ShardError, match=r"index\.json"):
        verify_shards(copy, stated)


def test_counts_that_do_not_add_up_are_found(copy: Path) -> None:
    document = json.loads((copy / "index.json").read_text())
    document["splits"]["valid"]["rows"] += 1
    sign(copy, document)
    with pytest.raises(ShardError, match="11 samples of valid, but the index counts 12"):
        verify_shards(copy)


def rellax(work: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rellax_ds.cli", "shards", "verify"]
    flags = ["--recipe", "ml100k_demo", "--work-dir", str(work)]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)


def test_verify_command_prints_a_line_a_split_or_the_damage(shards: Path, tmp_path: Path) -> None:
    run = WorkDir(tmp_path).open("shards", {"code": "made"}, {})
    shutil.copytree(shards, run.begin(), dirs_exist_ok=True)
    run.commit({})
    result = rellax(tmp_path)
    lines = result.stdout.splitlines()
    assert (result.returncode, len(lines)) == (0, 3)
    assert lines[0].startswith("train: 70 samples, ")
    assert all(line.endswith(": ok") for line in lines)
    path = tmp_path / "5_shards" / "test-00000.tar"
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    result = rellax(tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {path}, offset ")
    assert np.all([not line.startswith("test") for line in result.stdout.splitlines()])

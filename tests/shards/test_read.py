from __future__ import annotations

import io
import json
import random
import re
import shutil
import tarfile
from typing import TYPE_CHECKING

import numpy as np
import pytest

from rellax_ds.errors import ShardError
from rellax_ds.shards import read
from rellax_ds.shards.read import ShardIndex, ShardReader

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def test_reader_gives_samples_by_position_across_shards(shards: Path) -> None:
    reader = ShardReader.open(shards, "train")
    assert len(reader) == 70
    for position in (69, 0, 32, 31):
        assert reader[position].key == f"{reader[position].id:012d}" == reader.keys[position]
    for position in (-1, 70):
        with pytest.raises(IndexError):
            reader[position]
    reader.close()
    assert reader[5].tokens.dtype == np.int32


def test_shard_truncated_anywhere_is_refused_with_the_place(copy: Path) -> None:
    path = copy / "valid-00000.tar"
    whole = path.read_bytes()
    for size in sorted(random.Random(1).sample(range(len(whole)), 400)):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"valid-00000\.tar, offset \d+: .*rellax shards"):
            ShardReader.open(copy, "valid")
        with pytest.raises(ShardError):
            ShardReader.open(copy, "valid", verify="size")
    path.unlink()
    with pytest.raises(ShardError, match="no such file"):
        ShardReader.open(copy, "valid")


def test_shard_with_any_bit_flipped_is_refused(copy: Path) -> None:
    path = copy / "valid-00000.tar"
    whole = path.read_bytes()
    chance = random.Random(2)
    for _ in range(300):
        place = chance.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ShardError) as caught:
            ShardReader.open(copy, "valid")
        assert int(re.findall(r"offset (\d+)", str(caught.value))[0]) <= place
    path.write_bytes(whole[:4096] + bytes(2048) + whole[6144:])
    with pytest.raises(ShardError):
        ShardReader.open(copy, "valid")


def test_sample_changed_after_opening_is_refused_when_read(copy: Path) -> None:
    reader = ShardReader.open(copy, "valid")
    path = copy / "valid-00000.tar"
    changed = bytearray(path.read_bytes())
    place = changed.index(b'"label"')
    changed[place] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ShardError, match="offset 0: differs from the index"):
        reader[0]
    assert reader[1].id >= 0


def test_index_changed_anywhere_is_refused(copy: Path) -> None:
    path = copy / "index.json"
    whole = path.read_bytes()
    chance = random.Random(3)
    for _ in range(200):
        changed = bytearray(whole)
        place = chance.randrange(len(whole))
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            same = json.loads(changed) == json.loads(whole)
        except ValueError:
            same = False
        if not same:  # white space may change into other white space
            with pytest.raises(ShardError):
                ShardIndex.open(copy)
    path.write_bytes(whole[:-9])
    with pytest.raises(ShardError):
        ShardIndex.open(copy)
    path.unlink()
    with pytest.raises(ShardError, match="run `rellax shards` first"):
        ShardIndex.open(copy)


def test_item_table_changed_is_refused(copy: Path) -> None:
    path = copy / "crm.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ShardError, match=r"crm\.safetensors.*sha256"):
        ShardIndex.open(copy).item_table  # noqa: B018


def hostile(kind: bytes, name: str = "000000000001.instance.npy", size: int = 4) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        info.size = size if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
        tar.addfile(info, io.BytesIO(bytes(size)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_member_that_is_no_plain_file_is_refused(kind: bytes) -> None:
    with pytest.raises(ShardError, match="is not a plain file"):
        list(read.members(hostile(kind), "x.tar"))


@pytest.mark.parametrize("name", ["../x.instance.npy", "/etc/x.sample.json", "other.txt"])
def test_member_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(hostile(tarfile.REGTYPE, name))
    with pytest.raises(ShardError, match="lacks a member"):
        read.scan_shard(path)


def test_member_of_absurd_size_is_refused() -> None:
    data = hostile(tarfile.REGTYPE, size=17 << 20)
    with pytest.raises(ShardError, match="does not fit"):
        list(read.members(data, "x.tar"))
    with pytest.raises(ShardError, match="does not fit"):
        list(read.members(hostile(tarfile.REGTYPE, size=3000)[:2048], "x.tar"))

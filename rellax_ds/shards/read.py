"""Verified random access to shards: nothing is decoded that does not match the index.

A tar that lost its tail or a bit still looks like a tar to most readers, with fewer or other
samples. So the index is the truth. `index.json` is small: the size and sha256 of every shard, facts
about the prompts, and a digest of itself. `samples.parquet`, whose sha256 it names, holds a row a
sample: its place, length and checksum. `ShardReader.open` checks the files, every read checks the
sample again, and whatever differs is a `ShardError`. There is no mode that skips a bad sample.
Samples are read by position with `pread`; neither webdataset nor pickle is involved, and opening
costs the reading of a few columns, so a resume among millions of samples costs no more.
"""

from __future__ import annotations

import functools
import io
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rellax_ds import runtime, schema
from rellax_ds.artifacts import file_sha256
from rellax_ds.config import digest
from rellax_ds.errors import ShardError, TableError
from rellax_ds.shards.pool import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

FORMAT = 3
INDEX = "index.json"
SAMPLES = "samples.parquet"
CRM = "crm.safetensors"
MEMBERS = ("instance.npy", "sample.json", "tokens.npy")
"""The members of a sample, in the order they lie in the tar."""

SAMPLE_COLUMNS = {
    "sample": pa.int64(),
    "variant": pa.int8(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "crc32": pa.uint32(),
    "tokens": pa.int32(),
    "label": pa.int8(),
}
"""Columns of `samples.parquet`: sample id, position in `pool.VARIANTS`, place and number of bytes
in the shard, their checksum, tokens of the prompt and label of its target. Rows are in the order of
splits, shards and places; a shard has as many as `index.json` says.
"""

_BLOCK = 512
_MAX_MEMBER = 16 << 20
REMEDY = "run `rellax shards` again (delete the folder first if it says up to date)"
"""What every message about a damaged shard ends with."""


@dataclass(frozen=True)
class Sample:
    """One prompt of L tokens with what the recommender says about it.

    Attributes:
        key: Name in the shard: the sample id in 12 digits, and the variant in mixed data.
        tokens: int32 [3, L]: input ids; row of the item table at a soft-token slot, else -1; label
            where the next token is a supervised answer, else -1.
        instance: float32 [H], the standardised instance embedding h.
        facts: Ids, label, split, the recommender's logit, events shown, number dropped and variant.
    """

    key: str
    tokens: npt.NDArray[np.int32]
    instance: npt.NDArray[np.float32]
    facts: dict[str, Any]

    @property
    def id(self) -> int:
        """Row number in the table `samples`."""
        return int(self.facts["sample"])

    @property
    def label(self) -> int:
        """1 if the candidate was liked."""
        return int(self.facts["label"])


class Member(NamedTuple):
    """A file inside a tar: its name and where its header and data lie."""

    name: str
    header: int
    data: int
    size: int

    @property
    def end(self) -> int:
        """Position after the padded data."""
        return self.data + -(-self.size // _BLOCK) * _BLOCK


def members(data: bytes | memoryview, where: str, base: int = 0) -> Iterator[Member]:
    """The members of a tar, or of a whole number of its samples; accepts plain files only.

    Args:
        data: Bytes that begin with a header.
        where: What the message names.
        base: Position of `data` in the shard, for the message.

    Raises:
        ShardError: A header is damaged, is no regular file's, or reaches past the end.
    """
    position = 0
    while position < len(data):
        header = bytes(data[position : position + _BLOCK])
        if not header.strip(b"\0") and not bytes(data[position:]).strip(b"\0"):
            return
        try:
            total = int(header[148:156].rstrip(b"\0 "), 8)
            size = int(header[124:136].rstrip(b"\0 "), 8)
            name = header[:100].rstrip(b"\0").decode("ascii")
        except ValueError:
            raise _damaged(where, base + position, "holds no tar header") from None
        if len(header) < _BLOCK or sum(header) - sum(header[148:156]) + 8 * 32 != total:
            raise _damaged(where, base + position, "holds a damaged tar header")
        if header[156:157] not in (b"0", b"\0") or header[257:262] != b"ustar":
            raise _damaged(where, base + position, f"member {name!r} is not a plain file")
        member = Member(name, position, position + _BLOCK, size)
        if size > _MAX_MEMBER or member.end > len(data):
            raise _damaged(where, base + position, f"member {name!r} of {size} bytes does not fit")
        yield member
        position = member.end


class Found(NamedTuple):
    """A sample met in a tar: its key, and place, bytes and checksum."""

    key: str
    offset: int
    length: int
    crc32: int


def scan_shard(path: Path) -> list[Found]:
    """Read a closed shard back.

    Raises:
        ShardError: A sample lacks a member or has another one.
    """
    data = memoryview(path.read_bytes())
    samples = []
    found = list(members(data, str(path)))
    for n in range(0, len(found), len(MEMBERS)):
        group = found[n : n + len(MEMBERS)]
        key = group[0].name.partition(".")[0]
        if [member.name for member in group] != [f"{key}.{name}" for name in MEMBERS]:
            raise _damaged(str(path), group[0].header, f"sample {key!r} lacks a member")
        start, stop = group[0].header, group[-1].end
        samples.append(Found(key, start, stop - start, zlib.crc32(data[start:stop])))
    return samples


def sample_key(sample: int, variant: int, mixed: bool) -> str:
    """Name of a sample in its shard: its id in 12 digits, in mixed data followed by the variant."""
    return f"{sample:012d}" + (f"-{VARIANTS[variant]}" if mixed else "")


class ShardIndex:
    """The checked content of `index.json`.

    Attributes:
        folder: Folder of the shards.
        document: The whole index.
        digest: Identity of the shards: every byte of them is covered.
        mixed: Whether a sample may be written twice, so that its key names the variant.
    """

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        """Use `ShardIndex.open`."""
        self.folder, self.document = folder, document
        self.digest: str = document["digest"]
        self.mixed = bool(document["mixed"])

    @classmethod
    def open(cls, folder: Path) -> ShardIndex:
        """Read and check `index.json`.

        Raises:
            ShardError: It is absent, damaged, or of another format.
        """
        path = folder / INDEX
        try:
            document = json.loads(path.read_bytes())
            stated = document["digest"]
            rest = {key: value for key, value in document.items() if key != "digest"}
        except FileNotFoundError:
            raise ShardError(f"{path}: no such file; run `rellax shards` first") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"{path}: cannot be read ({error}); {REMEDY}") from None
        if digest(rest) != stated:
            raise ShardError(f"{path}: its content does not match its digest; {REMEDY}")
        if document["format"] != FORMAT:
            raise ShardError(f"{path}: format {document['format']}, expected {FORMAT}; {REMEDY}")
        return cls(folder, document)

    @property
    def answer_ids(self) -> tuple[int, int]:
        """Token ids of yes and no."""
        return self.document["answer_ids"]["yes"], self.document["answer_ids"]["no"]

    @property
    def history_supervised(self) -> bool:
        """Whether the history's own answers are marked in the samples."""
        return bool(self.document["history_supervised"])

    @property
    def soft_slots(self) -> bool:
        """Whether the prompts hold soft-token slots."""
        return bool(self.document["soft_slots"])

    @property
    def item_width(self) -> int:
        """E, width of the recommender's item embeddings."""
        return int(self.document["item_width"])

    @property
    def instance_width(self) -> int:
        """H, width of the recommender's instance embedding."""
        return int(self.document["instance_width"])

    @functools.cached_property
    def samples(self) -> pa.Table:
        """The rows of `samples.parquet`, see `SAMPLE_COLUMNS`.

        Raises:
            ShardError: The file is absent or altered.
        """
        path = self.folder / SAMPLES
        check_file(path, self.document["samples"], "sha256")
        try:
            table = schema.check_table(pq.read_table(path), SAMPLE_COLUMNS, str(path))
        except (OSError, pa.ArrowInvalid, TableError) as error:
            raise ShardError(f"{path}: cannot be read ({error}); {REMEDY}") from None
        wanted = sum(shard["n"] for shards in self.document["shards"].values() for shard in shards)
        if table.num_rows != wanted:
            raise ShardError(f"{path}: {table.num_rows} rows, not {wanted}; {REMEDY}")
        return table.combine_chunks()

    def rows(self, split: str) -> pa.Table:
        """The rows of one split, in the order of its samples."""
        shards = self.document["shards"]
        counts = {name: sum(shard["n"] for shard in shards[name]) for name in schema.SPLITS}
        start = sum(counts[name] for name in schema.SPLITS[: schema.SPLITS.index(split)])
        return self.samples.slice(start, counts[split])

    @functools.cached_property
    def item_table(self) -> npt.NDArray[np.float32]:
        """Standardised item embeddings, float32 [(1 + folds) * (num_items + 1), E]; row 0 is zeros.

        Raises:
            ShardError: The file is absent or altered.
        """
        from safetensors.numpy import load_file

        path = self.folder / CRM
        check_file(path, self.document["crm"], "sha256")
        table: npt.NDArray[np.float32] = load_file(path)["item_table"]
        return table


class ShardReader:
    """Random access to the samples of one split.

    Attributes:
        index: The index of all splits.
        split: `train`, `valid` or `test`.
        samples: int64 [N], sample id of every prompt.
        lengths: int64 [N], tokens of every prompt.
        labels: int64 [N], label of every target.
    """

    def __init__(self, index: ShardIndex, split: str, verify: Literal["sha256", "size"]) -> None:
        """Use `ShardReader.open`."""
        self.index, self.split = index, split
        self._shards = index.document["shards"][split]
        self._rows = index.rows(split)
        self.samples, self.lengths = self._column("sample"), self._column("tokens")
        self.labels, self._variants = self._column("label"), self._column("variant")
        self._offsets, self._bytes = self._column("offset"), self._column("length")
        self._crc32 = self._column("crc32")
        self._ends = np.cumsum([shard["n"] for shard in self._shards])
        self._files: dict[int, int] = {}
        for number in range(len(self._shards)):
            self._check_shard(number, "size")
        if verify == "sha256":
            self.verify()

    @classmethod
    def open(
        cls, folder: Path, split: str, verify: Literal["sha256", "size"] = "sha256"
    ) -> ShardReader:
        """Open a split after checking its shards against the index.

        Args:
            folder: Folder of stage 5.
            split: `train`, `valid` or `test`.
            verify: `size` leaves the sha256 of huge sets to the per-sample checksums.

        Raises:
            ShardError: The index or a shard is absent, truncated or altered.
        """
        return cls(ShardIndex.open(folder), split, verify)

    def verify(self) -> None:
        """Check the sha256 of every shard, in as many threads as this process has cores.

        Raises:
            ShardError: A shard differs; names the first sample that does.
        """
        with ThreadPoolExecutor(runtime.num_cpus()) as threads:
            checks = [
                threads.submit(self._check_shard, number, "sha256")
                for number in range(len(self._shards))
            ]
            try:
                for check in checks:
                    check.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def keys(self) -> list[str]:
        """Key of every sample."""
        return [self.key(position) for position in range(len(self))]

    def key(self, position: int) -> str:
        """Key of the sample at a position."""
        sample, variant = int(self.samples[position]), int(self._variants[position])
        return sample_key(sample, variant, self.index.mixed)

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            ShardError: Its bytes changed since the shard was verified.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        shard, offset = self._shards[number], int(self._offsets[position])
        data = os.pread(self._file(number), int(self._bytes[position]), offset)
        if zlib.crc32(data) != self._crc32[position]:
            raise _damaged(str(self.index.folder / shard["name"]), offset, "differs from the index")
        return self._decode(data, self.key(position), shard["name"], offset)

    def close(self) -> None:
        """Close the shards' files; they open again on the next read."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, number: int) -> int:
        if number not in self._files:
            path = self.index.folder / self._shards[number]["name"]
            self._files[number] = os.open(path, os.O_RDONLY)
        return self._files[number]

    def _decode(self, data: bytes, key: str, shard: str, offset: int) -> Sample:
        where = str(self.index.folder / shard)
        found = {
            member.name: data[member.data : member.data + member.size]
            for member in members(data, where, offset)
        }
        try:
            instance, facts, tokens = (found[f"{key}.{name}"] for name in MEMBERS)
            return Sample(key, _array(tokens, 2), _array(instance, 1), json.loads(facts))
        except (KeyError, ValueError, EOFError) as error:
            raise _damaged(where, offset, f"sample {key} cannot be decoded ({error})") from None

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        column: npt.NDArray[np.int64] = self._rows.column(name).to_numpy().astype(np.int64)
        return column

    def _check_shard(self, number: int, verify: str) -> None:
        """Check a shard's file, and name the sample at which it begins to differ."""
        facts = self._shards[number]
        path = self.index.folder / facts["name"]
        try:
            check_file(path, facts, verify)
        except ShardError:
            if path.is_file():
                self._name_damaged_sample(number, path)
            raise

    def _name_damaged_sample(self, number: int, path: Path) -> None:
        data = path.read_bytes()
        stop = int(self._ends[number])
        for position in range(stop - self._shards[number]["n"], stop):
            offset, length = int(self._offsets[position]), int(self._bytes[position])
            part, key = data[offset : offset + length], self.key(position)
            if len(part) < length:
                raise _damaged(str(path), len(data), f"ends inside sample {key} (at {offset})")
            if zlib.crc32(part) != self._crc32[position]:
                raise _damaged(str(path), offset, f"sample {key} differs from the index")


def _array(data: bytes, dimensions: int) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim != dimensions:
        raise ValueError(f"array of {array.ndim} dimensions, expected {dimensions}")
    return array


def check_file(path: Path, facts: dict[str, Any], verify: str = "sha256") -> None:
    """Check a file's size and, unless `verify` is `size`, its sha256.

    Raises:
        ShardError: It is absent or differs from `facts` (`bytes` and `sha256`).
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise ShardError(f"{path}: no such file; {REMEDY}") from None
    if size != facts["bytes"]:
        raise _damaged(str(path), min(size, facts["bytes"]), f"{size} bytes, not {facts['bytes']}")
    if verify == "sha256" and file_sha256(path) != facts["sha256"]:
        raise _damaged(str(path), 0, "its sha256 differs from the index")


def _damaged(where: str, offset: int, what: str) -> ShardError:
    return ShardError(f"{where}, offset {offset}: {what}; {REMEDY}")

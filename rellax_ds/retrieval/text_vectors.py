"""The vectors of texts, kept in stage 2's artefact so that a later run encodes only new texts.

A text is known by its sha256, and the file beside the vectors says how they were made: encoder,
length limit, device, library versions. The kept vectors are the encoder's own, before any
projection, so a change of `dimensions` encodes nothing. There is no cache to grow or to clean: what
is kept is exactly what the last committed artefact needed.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rellax_ds import runtime
from rellax_ds.artifacts import file_sha256, write_json
from rellax_ds.errors import TableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.artifacts import Manifest

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Digests = NDArray[np.uint8]

VECTORS, DIGESTS, ORIGIN = "text_vectors.npy", "text_digests.npy", "text_vectors.json"


@dataclass(frozen=True)
class TextVectors:
    """Vectors that need not be made again.

    Attributes:
        digests: sha256 of each text, uint8 [num_texts, 32].
        vectors: Float32 [num_texts, d], as the encoder gave them.
    """

    digests: Digests
    vectors: Floats

    def find(self, digests: Digests) -> Ints:
        """Row of each of `digests`, uint8 [n, 32], or -1."""
        if not len(self.digests):
            return np.full(len(digests), -1, np.int64)
        keys = _leading(self.digests)
        order = np.argsort(keys, kind="stable")
        place = np.searchsorted(keys[order], _leading(digests)).clip(max=len(keys) - 1)
        rows = order[place]
        return np.where((self.digests[rows] == digests).all(axis=1), rows, -1)


def text_digests(texts: Sequence[str]) -> Digests:
    """sha256 of each text in UTF-8, uint8 [len(texts), 32]."""
    joined = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def origin(encoder: str, max_tokens: int, device: str) -> dict[str, str]:
    """What a vector's bits depend on beside its text: where it differs, no vector is taken over."""
    libraries = {name: runtime.versions().get(name, "") for name in ("torch", "transformers")}
    own = {"encoder": encoder, "max_tokens": str(max_tokens), "device": device, "pooling": "1"}
    return {**own, **libraries, "machine": platform.machine()}


def read_known(
    folder: Path, manifest: Manifest | None, made_by: Mapping[str, str]
) -> TextVectors | None:
    """The vectors of a committed artefact, if they were made the same way and are intact.

    Args:
        folder: The artefact's folder.
        manifest: Its manifest, if it has one.
        made_by: What `origin` says of the run that asks.
    """
    if manifest is None or not {VECTORS, DIGESTS, ORIGIN} <= set(manifest.files):
        return None
    try:
        if json.loads((folder / ORIGIN).read_text(encoding="utf-8")) != dict(made_by):
            return None
        for name in (VECTORS, DIGESTS):
            if file_sha256(folder / name) != manifest.files[name]["sha256"]:
                runtime.logger.warning("%s: damaged; all texts are encoded again", folder / name)
                return None
        digests = np.load(folder / DIGESTS, allow_pickle=False)
        vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return TextVectors(digests, vectors)


def write_known(folder: Path, digests: Digests, made_by: Mapping[str, str]) -> None:
    """Write what `read_known` needs beside `VECTORS`."""
    np.save(folder / DIGESTS, digests)
    write_json(folder / ORIGIN, dict(made_by))


def by_length(texts: Sequence[str]) -> Ints:
    """Positions of `texts` by their number of bytes, so that a partition holds like lengths."""
    sizes = pc.binary_length(pa.array(texts, pa.large_string())).to_numpy()
    order: Ints = np.argsort(sizes, kind="stable").astype(np.int64)
    return order


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write texts so that a worker can read a range without the rest: Arrow IPC, uncompressed."""
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_texts(path: Path, start: int, stop: int) -> list[str]:
    """Texts `start:stop` of `write_texts`.

    Raises:
        TableError: The file is absent or no Arrow file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            column = pa.ipc.open_file(source).read_all()["text"]
            texts: list[str] = column.slice(start, stop - start).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise TableError(
            f"{path}: not a readable Arrow file ({reason}); run the same command again"
        ) from None
    return texts


def _leading(digests: Digests) -> NDArray[np.uint64]:
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()

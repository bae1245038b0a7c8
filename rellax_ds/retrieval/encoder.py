"""Item text to vectors with any Hugging Face encoder or language model.

A text's vector is the mean of the last hidden states (after the final norm) over its own tokens;
special tokens count only for models trained that way, which are those that carry a
sentence-transformers pooling file. No chat prompt surrounds the text. Equal texts are encoded once,
so that they get equal vectors to the last bit and tie in the retrieval.

A batch holds texts of one length in tokens and no padding: padding is work for nothing, and it
moves the last bits of a vector (of 1,664 MovieLens texts, 390 had other bits beside longer ones).
Without it a text's vector was the same to the last bit in batches of 1 to 64, for an encoder and
for a language model, on a CPU with one thread, as the workers run. That is what lets vectors be
kept: encoding only the new texts gives the bytes that encoding all would. A GPU chooses its kernels
by the batch's shape and gives no such promise; there kept and new vectors agree as float32 does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from rellax_ds.errors import AssetError
from rellax_ds.retrieval.text_vectors import read_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from rellax_ds.partitions import Partition

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]


class ItemEncoder:
    """Partition worker: encodes a range of the texts that have no vector yet.

    Writes `PARTITION.npy`, float32 [stop - start, d], not normalised.
    """

    def __init__(
        self, *, texts_path: str, model: str, batch_size: int, max_tokens: int, device: str
    ) -> None:
        """Load the model.

        Args:
            texts_path: The texts, see `text_vectors.write_texts`.
            model: Local folder or Hugging Face name.
            batch_size: Most texts in one forward pass.
            max_tokens: Longer texts are cut, also at the model's own limit.
            device: Where the model runs.
        """
        from transformers import AutoModel, AutoTokenizer

        if device == "cpu":
            torch.set_num_threads(1)
        self._texts_path = Path(texts_path)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
        limit = getattr(self._model.config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = min(max_tokens, limit, self._tokenizer.model_max_length)
        self._batch_size = batch_size
        self._with_special = (Path(model) / "1_Pooling" / "config.json").is_file()

    def __call__(self, partition: Partition, directory: Path) -> dict[str, Any]:
        """Encode texts `start:stop`."""
        start, stop = partition.payload["start"], partition.payload["stop"]
        vectors = self.encode(read_texts(self._texts_path, start, stop))
        np.save(directory / f"{partition.name}.npy", vectors)
        return {"texts": stop - start}

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Floats:
        """Vectors of `texts`, float32 [len(texts), d]; a text without tokens gets zeros."""
        width = int(self._model.config.hidden_size)
        vectors = np.zeros((len(texts), width), np.float32)
        if not texts:
            return vectors
        encoded = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._max_tokens,
            return_special_tokens_mask=True,
            return_token_type_ids=False,
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]], np.int64)
        for rows in batches(lengths, self._batch_size):
            vectors[rows] = self._encode_batch(encoded, rows.tolist())
        return vectors

    def _encode_batch(self, encoded: Any, rows: list[int]) -> Floats:
        device = self._model.device
        ids = torch.tensor([encoded["input_ids"][row] for row in rows], device=device)
        weight = torch.ones(ids.shape, dtype=torch.float32, device=device)
        if not self._with_special:
            special = [encoded["special_tokens_mask"][row] for row in rows]
            weight -= torch.tensor(special, dtype=torch.float32, device=device)
        hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        total = torch.einsum("blh,bl->bh", hidden, weight)
        mean = total / weight.sum(dim=1, keepdim=True).clamp_min(1.0)
        vectors: Floats = mean.cpu().numpy()
        return vectors


def batches(lengths: Ints, batch_size: int) -> Iterator[Ints]:
    """Rows in batches of equal length, at most `batch_size` a batch; rows of length 0 are left
    out.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    for bucket in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        for first in range(0, bucket.size, batch_size):
            yield bucket[first : first + batch_size]


def check_encoder(model: str) -> None:
    """Check that there is a model of that name, before workers are started for it.

    Raises:
        AssetError: transformers finds no model there.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise AssetError(
            f"embeddings.encoder: '{model}' is no model that transformers can load ({reason}); "
            "give an asset name, a local folder or a Hugging Face name"
        ) from None


def distinct_texts(texts: pa.Array) -> tuple[list[str], Ints]:
    """The distinct texts without the empty one, in order of first appearance, and for every item
    the position of its text among them, -1 for an empty text.
    """
    encoded = texts.dictionary_encode()
    words = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy().astype(np.int64)
    kept = np.array([bool(word) for word in words], bool)
    position = np.where(kept, np.cumsum(kept) - 1, -1)
    return [word for word in words if word], position[codes]


def finish_vectors(vectors: Floats, position: Ints, dimensions: int | None) -> Floats:
    """From vectors of distinct texts to unit vectors of items.

    Args:
        vectors: Float32 [num_texts, d].
        position: Row of `vectors` per item, -1 for an item without text.
        dimensions: PCA components, clamped to min(dimensions, d, items with text - 1); None leaves
            the space as it is. The axes are fitted on all items, text only, no labels.

    Returns:
        Float32 [num_items, d or components]; unit rows, zeros for items without text.
    """
    has_text = position >= 0
    rows = vectors[position[has_text]].astype(np.float64)
    if dimensions is not None and len(rows):
        rows = _principal_components(rows, max(1, min(dimensions, rows.shape[1], len(rows) - 1)))
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    # Products of equal rows may differ in their last bit; equal texts must not.
    _, first, inverse = np.unique(position[has_text], return_index=True, return_inverse=True)
    finished = np.zeros((position.size, rows.shape[1]), np.float32)
    finished[has_text] = rows[first][inverse]
    return finished


def _principal_components(rows: NDArray[np.float64], components: int) -> NDArray[np.float64]:
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :components]
    # An eigenvector is free in its sign: its largest entry is made positive.
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(components)])
    projected: NDArray[np.float64] = centred @ axes
    return projected

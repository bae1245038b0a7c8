"""How far each layer's M(h) of a saved adapter departs from plain LoRA.

The gates need h and their own weights, not the LLM. A layer
whose departure stays at zero is plain LoRA; one whose departure does not vary over the samples has
learned a constant, which B could have held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rellax_ds.model import adapter_io, cflora
from rellax_ds.model.interaction import interaction_norms, stacked_interaction
from rellax_ds.model.tensors import check_tensors, read_tensors
from rellax_ds.shards.order import spread
from rellax_ds.shards.read import ShardReader

if TYPE_CHECKING:
    from pathlib import Path

_SAMPLES = 256


def gate_norms(adapter: Path, shards: Path) -> list[dict[str, Any]]:
    """The departure of every adapted layer, over up to 256 test samples.

    Args:
        adapter: Folder of a saved adapter.
        shards: Folder of stage 5.

    Returns:
        For each layer in order its name, the mean over the samples of the Frobenius norm of
        M(h) - I, and the standard deviation over the samples; empty for plain LoRA.

    Raises:
        CheckpointError: The adapter is damaged.
    """
    meta = adapter_io.read_meta(adapter)
    spec = meta["model"].spec
    if spec.kind == "identity":
        return []
    tensors = read_tensors(adapter / cflora.WEIGHTS)
    names = meta["layers"]
    width = None if spec.input_independent else meta["instance_dim"]
    gates = stacked_interaction(spec, len(names), width)
    mark = f".{cflora.CONTAINER}."
    saved = {n.rpartition(".")[2]: t.float() for n, t in tensors.items() if mark in n}
    check_tensors(saved, dict(gates.named_parameters()), adapter / cflora.WEIGHTS)
    gates.load_state_dict(saved)
    reader = ShardReader.open(shards, "test", verify="size")
    chosen = spread(reader.samples, _SAMPLES)
    with torch.inference_mode():
        h = torch.from_numpy(np.stack([reader[position].instance for position in chosen]))
        found = gates(h)
        each = torch.stack([interaction_norms(found[:, n : n + 1]) for n in range(len(chosen))])
    mean, std = each.mean(0).tolist(), each.std(0, correction=0).tolist()
    return [
        {"layer": name, "mean": m, "std": s} for name, m, s in zip(names, mean, std, strict=True)
    ]

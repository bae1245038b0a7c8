"""Saved adapters: equal scores after loading, and every kind of damage refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from rellax_ds.errors import CheckpointError
from rellax_ds.model import adapter_io

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.batch import Batch
    from rellax_ds.model.rellax import ReLLaX


def scores(model: ReLLaX, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.tensors())[1]


@pytest.mark.parametrize(
    "fields", [{}, {"interaction": "identity", "spa": False}, {"residual": "crm"}]
)
def test_adapter_saved_and_loaded_gives_equal_scores(
    build: Callable[..., ReLLaX],
    backbones: dict[str, Path],
    batch: Batch,
    tmp_path: Path,
    fields: dict[str, object],
) -> None:
    model = build(spa_bottleneck=7, **fields) if not fields else build(**fields)
    model.centre.fill_(-1.25)
    if model.residual is not None:
        model.residual.blend.copy_(torch.tensor([0.8, 0.7, -0.1]))
    adapter_io.save(model, tmp_path / "adapter")
    loaded = adapter_io.load(tmp_path / "adapter", str(backbones["llama"]))
    assert not loaded.training
    assert torch.equal(scores(loaded, batch), scores(model.eval(), batch))
    meta = adapter_io.read_meta(tmp_path / "adapter")
    assert meta["answer_ids"] == {"yes": 11, "no": 12}
    assert meta["model"] == model.config


def test_adapter_with_gates_only_trained_still_holds_the_factors(
    build: Callable[..., ReLLaX], batch: Batch, backbones: dict[str, Path], tmp_path: Path
) -> None:
    first = build(interaction="identity")
    adapter_io.save(first, tmp_path / "one")
    second = build(trained=False, adapter=tmp_path / "one", train_factors=False)
    torch.testing.assert_close(scores(second.eval(), batch), scores(first.eval(), batch))
    adapter_io.save(second, tmp_path / "two")
    loaded = adapter_io.load(tmp_path / "two", str(backbones["llama"]))
    assert torch.equal(scores(loaded, batch), scores(second, batch))


def damaged_file(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def empty_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[sorted(tensors)[0]] = torch.empty(0)
    save_file(tensors, folder / "adapter_model.safetensors")


def lost_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.cflora_interaction.weight_in"]
    save_file(tensors, folder / "adapter_model.safetensors")


def lost_projector(folder: Path) -> None:
    (folder / "spa.safetensors").unlink()


def foreign_format(folder: Path) -> None:
    meta = json.loads((folder / "rellax.json").read_text())
    (folder / "rellax.json").write_text(json.dumps(meta | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_file, "not a readable safetensors file"),
        (empty_tensor, "empty"),
        (lost_tensor, "1 tensors are missing"),
        (lost_projector, "spa.safetensors"),
        (foreign_format, "format 99"),
    ],
)
def test_adapter_damaged_is_refused(
    build: Callable[..., ReLLaX],
    backbones: dict[str, Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    adapter_io.save(build(), tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        adapter_io.load(tmp_path, str(backbones["llama"]))


def test_adapter_of_another_backbone_is_refused(
    build: Callable[..., ReLLaX], backbones: dict[str, Path], tmp_path: Path
) -> None:
    adapter_io.save(build("llama", target_modules=("v_proj",), spa=False), tmp_path)
    with pytest.raises(CheckpointError, match="missing"):
        adapter_io.restore(build("llama", spa=False), tmp_path)


def test_adapter_with_an_empty_tensor_is_never_written(
    build: Callable[..., ReLLaX], tmp_path: Path
) -> None:
    model = build()
    model.spa.null.data = torch.empty(0)
    with pytest.raises(CheckpointError, match="not gathered"):
        adapter_io.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

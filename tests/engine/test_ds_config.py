"""The DeepSpeed JSON and the recipe: who owns which key, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rellax_ds.config import TrainConfig
from rellax_ds.engine.ds_config import (
    accumulation_steps,
    ds_config_digest,
    read_ds_config,
    resolve_ds_config,
)
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(document: dict[str, Any], **fields: Any) -> TrainConfig:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | document))
        return TrainConfig(ds_config=path, global_batch=16, micro_batch=4, **fields)

    return make


def test_resolved_config_takes_batch_precision_and_clipping_from_the_recipe(
    train: Callable[..., TrainConfig],
) -> None:
    resolved = resolve_ds_config(train({}, precision="bf16", clip=0.5), world_size=2)
    assert resolved["train_batch_size"] == 16
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_resolves_to_its_stage_without_a_guess(path: Path) -> None:
    resolved = resolve_ds_config(TrainConfig(ds_config=path), world_size=2)
    assert path.stem.startswith(f"zero{resolved['zero_optimization']['stage']}_")
    assert "auto" not in json.dumps(resolved)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"train_batch_size": 32}, ["train_batch_size", "32", "train.global_batch", "16"]),
        ({"gradient_clipping": 2.0}, ["gradient_clipping", "2.0", "train.clip"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "train.precision fp32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "train.precision"]),
        ({"optimizer": {"type": "Lion"}}, ["optimizer.type", "Lion", "AdamW"]),
        ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.params.lr", "train.learning_rate"]),
        ({"fp16": {"loss_scale": 0}}, ["fp16.loss_scale", "recipe"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.schedule"]),
        ({"gradient_clipping": "auto"}, ["gradient_clipping", "auto"]),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, ["reduce_bucket_size", "auto"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "'zero_optimization'"]),
    ],
)
def test_config_that_disagrees_or_guesses_is_refused_by_name(
    train: Callable[..., TrainConfig], document: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_ds_config(train(document), world_size=1)
    for part in expected:
        assert part in str(caught.value)


def test_config_that_agrees_with_the_recipe_is_accepted(
    train: Callable[..., TrainConfig],
) -> None:
    agreeing = {
        "train_batch_size": 16,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}},
    }
    assert "optimizer" not in resolve_ds_config(train(agreeing), world_size=1)


def test_accumulation_that_does_not_divide_names_the_world_sizes_that_do() -> None:
    assert accumulation_steps(48, 4, 3) == 4
    with pytest.raises(ConfigError, match=r"1, 2, 3, 4, 6, 12$"):
        accumulation_steps(48, 4, 5)


def test_config_path_is_found_from_another_folder_and_missing_one_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = Path("ds_configs/zero3_fp32_cpu.json")
    assert read_ds_config(named) == json.loads((ROOT / named).read_text())
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / named).write_text('{"steps_per_print": 7}')
    assert read_ds_config(named) == {"steps_per_print": 7}
    with pytest.raises(ConfigError, match=r"missing\.json: no such file") as caught:
        read_ds_config(Path("missing.json"))
    assert "\n" not in str(caught.value)


def test_digest_follows_the_content_and_not_the_path(
    train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = train({})
    other = tmp_path / "copy.json"
    other.write_text(config.ds_config.read_text() + "\n")
    same = config.model_copy(update={"ds_config": other})
    assert ds_config_digest(same) == ds_config_digest(config)
    other.write_text('{"zero_optimization": {"stage": 3, "overlap_comm": true}}')
    assert ds_config_digest(same) != ds_config_digest(config)

"""What a run does with bad rows, a flat score, a committed adapter and a foreign checkpoint."""

from __future__ import annotations

import itertools
import json
import resource
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from rellax_ds.config import load_recipe
from rellax_ds.errors import CheckpointError, ConfigError, RellaxError
from rellax_ds.model import adapter_io
from rellax_ds.stages.train import run_train

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from pathlib import Path

    from rellax_ds.artifacts import WorkDir


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_row_without_a_finite_loss_skips_its_step_and_training_ends_with_finite_weights(
    recipe_file: Path, make_work: Callable[..., WorkDir], caplog: pytest.LogCaptureFixture
) -> None:
    work = make_work(poisoned=True)
    strict = load_recipe(recipe_file, ["train.max_skips=1"])
    with pytest.raises(RellaxError, match=r"max_skips.*learning_rate"):
        run_train(strict, work)
    manifest = run_train(load_recipe(recipe_file), work)
    assert manifest.counts["skipped"] == 4
    folder = work.stage_dir("train")
    assert [r["loss"] for r in records(folder, "step")].count(None) == 4
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert "is not finite" in caplog.text


def test_schedule_does_not_advance_over_skipped_steps(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work(poisoned=True)
    run_train(load_recipe(recipe_file, ["train.warmup=0"]), work)
    steps = records(work.stage_dir("train"), "step")
    expected = [1 - (r["step"] - 1 - p["skipped"]) / 12 for p, r in itertools.pairwise(steps)]
    assert [r["rate"] for r in steps[1:]] == pytest.approx(expected)


def test_schedule_of_five_epochs_falls_by_its_share_in_one(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    stretched = ["train.epochs=1", "train.schedule_epochs=5", "train.warmup=0"]
    run_train(load_recipe(recipe_file, stretched), work)
    rates = [r["rate"] for r in records(work.stage_dir("train"), "step")]
    assert rates == pytest.approx([1 - step / 15 for step in range(3)])
    with pytest.raises(ConfigError, match="schedule_epochs 3 is less than epochs 4"):
        load_recipe(recipe_file, ["train.schedule_epochs=3"])


def test_cuts_of_one_global_batch_into_micro_batches_train_the_same(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    losses, weights = [], []
    for micro_batch in (8, 4, 1):
        work = make_work()
        cut = [f"train.micro_batch={micro_batch}", "model.dropout=0", "train.epochs=2"]
        run_train(load_recipe(recipe_file, cut), work)
        folder = work.stage_dir("train")
        losses.append([r["loss"] for r in records(folder, "step")])
        weights.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        assert loss == pytest.approx(losses[0], abs=1e-6)
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weight[name], tensor, rtol=0, atol=1e-5)


def test_flat_valid_score_stops_early_and_the_first_adapter_stays(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    frozen = ["train.learning_rate=1e-12", "train.interaction_learning_rate=1e-12"]
    recipe = load_recipe(recipe_file, [*frozen, "train.patience=1"])
    manifest = run_train(recipe, work)
    assert (manifest.counts["steps"], manifest.counts["step"]) == (6, 3)
    assert run_train(recipe, work) == manifest
    assert not list(work.root.glob(".running/*"))


def test_untrained_model_starts_at_the_base_rate(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    found = {}
    for centred in ("true", "false"):
        work = make_work()
        recipe = load_recipe(recipe_file, [f"train.centre_logit={centred}", "train.epochs=1"])
        run_train(recipe, work)
        found[centred] = records(work.stage_dir("train"), "valid")[0]
        meta = json.loads((work.stage_dir("train") / "adapter" / "rellax.json").read_text())
        assert meta["centre"] == found[centred]["centre"]
    assert found["false"]["centre"] == 0.0
    assert found["true"]["auc"] == found["false"]["auc"]
    assert found["true"]["log_loss"] != found["false"]["log_loss"]


def test_training_of_no_epochs_commits_the_model_as_it_is_scored_at_step_0(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    manifest = run_train(load_recipe(recipe_file, ["train.epochs=0"]), work)
    folder = work.stage_dir("train")
    (scored,) = records(folder, "valid")
    assert records(folder, "step") == []
    assert (manifest.counts["steps"], manifest.counts["step"]) == (0, 0)
    assert manifest.counts["valid_auc"] == scored["auc"] == manifest.counts["untrained"]["auc"]
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    up = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert up
    assert not any(bool(tensor.any()) for tensor in up)
    assert json.loads((folder / "adapter" / "rellax.json").read_text())["centre"] != 0.0


def test_llm_beside_the_recommender_is_blended_by_what_fits_the_valid_rows(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    run_train(load_recipe(recipe_file, ["model.residual=crm", "train.epochs=4"]), work)
    folder = work.stage_dir("train")
    scored = records(folder, "valid")
    best = next(r for r in scored if r["step"] == r["best_step"])
    kept = json.loads((folder / "adapter" / "rellax.json").read_text())
    assert kept["blend"] == best["blend"]
    assert kept["blend"] != [1.0, 0.0, 0.0]
    assert all(r["blend"][1] >= 0 for r in scored)
    assert scored[0]["blend"] != scored[-1]["blend"], "fitted again whenever valid is scored"
    plain = make_work()
    run_train(load_recipe(recipe_file, ["train.epochs=1"]), plain)
    (alone, *_) = records(plain.stage_dir("train"), "valid")
    assert alone["blend"] is None
    assert scored[0]["log_loss"] < alone["log_loss"], "the recommender helps before training"


def test_blend_without_training_is_kept_and_scored_as_it_is_logged(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    manifest = run_train(load_recipe(recipe_file, ["model.residual=crm", "train.epochs=0"]), work)
    (scored,) = records(work.stage_dir("train"), "valid")
    kept = json.loads((work.stage_dir("train") / "adapter" / "rellax.json").read_text())
    assert kept["blend"] == scored["blend"] == manifest.counts["blend"]
    assert manifest.counts["valid_auc"] == scored["auc"]


def test_checkpoint_of_another_recipe_is_refused_by_field_and_survives(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work(poisoned=True)
    with pytest.raises(RellaxError, match="max_skips"):
        run_train(load_recipe(recipe_file, ["train.max_skips=1", "seed=8"]), work)
    (checkpoint,) = list(work.root.glob(".running/6_train-*/checkpoints/step-*"))[:1]
    other = load_recipe(recipe_file, ["seed=8", "train.epochs=3", "model.alpha=7"])
    with pytest.raises(CheckpointError, match=r"model\.alpha, train\.epochs"):
        run_train(other, work, str(checkpoint))
    assert checkpoint.is_dir()
    with pytest.raises(CheckpointError, match="never committed"):
        run_train(other, work, str(work.root))


def test_conflict_with_the_deepspeed_json_is_found_before_a_model_is_loaded(
    recipe_file: Path, make_work: Callable[..., WorkDir], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 9.0}')
    recipe = load_recipe(recipe_file, [f"train.ds_config={path}"])
    with pytest.raises(ConfigError, match=r"gradient_clipping.*train\.clip"):
        run_train(recipe, make_work())
    assert torch.distributed.is_initialized()


def test_ranks_that_cannot_share_the_batch_are_refused_before_any_is_started(
    recipe_file: Path, make_work: Callable[..., WorkDir]
) -> None:
    work = make_work()
    with pytest.raises(ConfigError, match="number of ranks can be 1, 2"):
        run_train(load_recipe(recipe_file, ["train.num_processes=3"]), work)
    assert not work.root.joinpath(".running").exists()


@pytest.fixture
def fill_disk_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Container[int]], None]:
    """The n-th times the best adapter is written, files may not grow beyond 100 bytes."""

    def choose(times: Container[int]) -> None:
        write, count = adapter_io.write, itertools.count(1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def write_with_little_room(state: adapter_io.AdapterState, folder: Path) -> None:
            size = 100 if next(count) in times else limits[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                write(state, folder)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(adapter_io, "write", write_with_little_room)

    return choose


def test_best_adapter_that_cannot_be_written_leaves_the_one_before_and_training_goes_on(
    recipe_file: Path,
    make_work: Callable[..., WorkDir],
    caplog: pytest.LogCaptureFixture,
    fill_disk_at: Callable[[Container[int]], None],
) -> None:
    fill_disk_at({2})
    work = make_work()
    manifest = run_train(load_recipe(recipe_file), work)
    folder = work.stage_dir("train")
    scores = records(folder, "valid")[1:]
    assert [s["step"] for s in scores] == [3, 6, 9, 12]
    assert scores[1]["auc"] > scores[0]["auc"], "the made-up run must improve"
    assert [s["best_step"] for s in scores] == [3, 3, 9, 12]
    assert "the adapter of step 6, the best so far, was not kept" in caplog.text
    assert "that of step 3 stays" in caplog.text
    assert manifest.counts["step"] == 12
    assert not (folder / ".adapter").exists()


def test_training_without_room_for_any_adapter_fails_and_says_so(
    recipe_file: Path,
    make_work: Callable[..., WorkDir],
    fill_disk_at: Callable[[Container[int]], None],
) -> None:
    fill_disk_at(range(100))
    work = make_work()
    with pytest.raises(CheckpointError, match="no adapter of this training could be written"):
        run_train(load_recipe(recipe_file, ["train.epochs=1"]), work)
    assert work.manifest("train") is None

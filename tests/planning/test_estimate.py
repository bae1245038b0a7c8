"""Whole plans: every shipped recipe, what is refused, committed shards, both forms of output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from rellax_ds.artifacts import WorkDir, file_sha256
from rellax_ds.cli import app
from rellax_ds.config import digest, load_recipe, shipped_recipes
from rellax_ds.errors import ConfigError
from rellax_ds.planning.estimate import Machines, make_plan
from rellax_ds.planning.memory import GIB
from rellax_ds.planning.show import size
from rellax_ds.planning.work import sample_bytes
from rellax_ds.prompts.templates import load_template
from rellax_ds.schema import SPLITS
from rellax_ds.shards.pool import read_splits
from rellax_ds.shards.read import FORMAT, INDEX, SAMPLE_COLUMNS, SAMPLES
from rellax_ds.stages.pipeline import load_stage
from rellax_ds.tables import write_parquet
from rellax_ds.testing import tiny_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.config import Recipe
    from rellax_ds.planning.estimate import Plan

SEVENTY = "model.backbone=meta-llama/Meta-Llama-3-70B-Instruct"
WIDE = ["train.global_batch=4096", "train.micro_batch=1"]


def plan(recipe: str, *overrides: str, work: Path | None = None, **machines: float) -> Plan:
    from pathlib import Path

    folder = work or Path("there is no such folder")
    return make_plan(load_recipe(recipe, list(overrides)), WorkDir(folder), Machines(**machines))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_fits_the_machine_it_is_written_for(name: str) -> None:
    recipe = load_recipe(name)
    gib = 24 if name.endswith("qlora") else 80
    made = plan(name, gpu_memory=gib)
    assert made.ranks == recipe.train.num_processes
    assert 0 < made.total.device < gib * GIB
    assert made.work.steps * recipe.train.global_batch == made.work.samples
    load_template(recipe.shards.template)
    trained = {w.group for w in made.shape.weights if w.trained}
    expected = {"factors"} if recipe.model.train_factors else set()
    expected |= {"interaction"} if recipe.model.interaction != "identity" else set()
    assert trained == expected | ({"spa"} if recipe.model.spa else set())


@pytest.mark.parametrize("data", ["ml1m_vicuna7b", "ml25m_vicuna13b", "bookcrossing_vicuna13b"])
def test_second_phase_starts_from_the_first_ones_adapter(data: str) -> None:
    first, second = load_recipe(f"{data}_lora"), load_recipe(data)
    assert str(second.model.adapter) == f"work/{first.name}/6_train/adapter"
    assert first.model.interaction == "identity"
    assert not second.model.train_factors
    upstream = ("data", "embeddings", "retrieval", "crm", "seed")
    assert first.section_digest(*upstream) == second.section_digest(*upstream)


def test_more_ranks_need_less_each_up_to_thousands() -> None:
    totals = [
        plan("ml1m_vicuna7b", SEVENTY, *WIDE, ranks=ranks).total.device
        for ranks in (1, 8, 64, 4096)
    ]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 131 * GIB
    assert totals[3] < 20 * GIB


@pytest.mark.parametrize(
    ("overrides", "ranks", "parts"),
    [
        (["train.gradient_checkpointing=false"], 8, ["activations", "gradient_checkpointing=true"]),
        (["train.micro_batch=32"], 8, ["activations", "lower train.micro_batch (it is 32)"]),
        (["train.eval_batch=512"], 8, ["in evaluation", "lower train.eval_batch"]),
        ([SEVENTY, "train.micro_batch=1"], 1, ["frozen weights", "more ranks", "nf4"]),
    ],
)
def test_recipe_that_does_not_fit_is_refused_with_its_largest_term_and_knob(
    overrides: list[str], ranks: int, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("ml1m_vicuna7b", *overrides, ranks=ranks, gpu_memory=24)
    for part in (*parts, "--gpu-memory is 24", "GiB"):
        assert part in str(caught.value)


def test_offload_makes_a_large_model_fit_and_counts_the_host() -> None:
    offload = "train.ds_config=ds_configs/zero3_bf16_offload.json"
    made = plan("ml1m_vicuna7b", SEVENTY, offload, ranks=8, hosts=2, gpu_memory=24)
    assert made.total.host > made.shape.count("backbone", trained=False) * 2 / 8


def test_batch_or_hosts_the_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="number of ranks can be 1, 2, 4, 8, 16, 32, 64"):
        plan("ml1m_vicuna7b", ranks=7)
    with pytest.raises(ConfigError, match="8 ranks cannot be spread evenly over 3 hosts"):
        plan("ml1m_vicuna7b", ranks=8, hosts=3)


def test_rows_come_from_the_recipe_or_a_published_release_and_tokens_are_bounds() -> None:
    made = plan("bookcrossing_vicuna13b_lora", tokens_per_second=1000.0).work
    assert [made.prompts[split].rows for split in ("train", "valid", "test")] == [2048, 1594, 1772]
    assert not made.prompts["train"].exact
    assert (made.steps, made.tokens, made.seconds) == (8, 2048 * 2048, 2048 * 2048 / 1000)
    assert (
        plan("bookcrossing_vicuna13b_lora", "data.min_history=6").work.prompts["test"].rows is None
    )


def commit_shards(work: WorkDir, recipe: Recipe, lengths: dict[str, list[int]]) -> None:
    """An index of prompts of these lengths, as stage 5 commits it, in shards of 100 bytes."""
    attempt = work.open("shards", {}, recipe.model_dump(mode="json"))
    folder = attempt.begin()
    tokens = [length for split in SPLITS for length in lengths[split]]
    columns = {name: pa.array([0] * len(tokens), kind) for name, kind in SAMPLE_COLUMNS.items()}
    columns["tokens"] = pa.array(tokens, SAMPLE_COLUMNS["tokens"])
    write_parquet(pa.table(columns), folder / SAMPLES)
    document = {
        "format": FORMAT,
        "mixed": False,
        "item_width": 6,
        "instance_width": 5,
        "samples": {
            "bytes": (folder / SAMPLES).stat().st_size,
            "sha256": file_sha256(folder / SAMPLES),
        },
        "shards": {split: [{"bytes": 100, "n": len(lengths[split])}] for split in SPLITS},
    }
    (folder / INDEX).write_text(json.dumps(document | {"digest": digest(document)}))
    attempt.commit({})


def test_committed_shards_are_counted_if_they_are_of_the_recipe(tmp_path: Path) -> None:
    path = str(tiny_recipe(tmp_path))
    recipe, work = load_recipe(path), WorkDir(tmp_path / "work")
    commit_shards(work, recipe, {"train": [20, 31, 27] * 6, "valid": [40, 12], "test": [9]})
    made = plan(path, work=work.root)
    train = made.work.prompts["train"]
    assert (train.rows, train.shards, train.disk, train.exact) == (18, 1, 100, True)
    assert made.tokens == recipe.train.micro_batch * 31
    assert (made.work.steps, made.work.samples) == (2, 16)
    assert made.work.tokens == round(6 * 78 * 16 / 18)
    assert made.shape.count("spa", trained=True) == (6 + 1) * 32 + (32 + 1) * 32 + 32

    other = plan(path, "shards.history_length=3", work=work.root).work.prompts
    assert (other["train"].rows, other["train"].exact) == (48, False)


def test_committed_tables_tell_how_many_rows_all_are(tmp_path: Path) -> None:
    path = str(tiny_recipe(tmp_path))
    work = WorkDir(tmp_path / "work")
    load_stage("tables").run(load_recipe(path), work)
    found = plan(path, "shards.test_rows=null", work=work.root).work.prompts["test"]
    tested = int((read_splits(work.stage_dir("tables")) == SPLITS.index("test")).sum())
    assert (found.rows, found.source) == (tested, "committed tables")


def test_command_prints_text_and_the_same_figures_as_json() -> None:
    arguments = ["plan", "--recipe", "ml1m_vicuna7b", "--gpu-memory", "80"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    for line in ("config shipped with rellax-ds", "6,738,415,616", "fits 80 GiB", "an upper bound"):
        assert line in shown.stdout
    assert f"{found['total']['device'] / GIB:.3f}" in shown.stdout
    assert found["parameters"]["backbone"]["frozen"] == 6_738_415_616
    assert sum(term["device"] for term in found["terms"].values()) == found["total"]["device"]


def test_prompt_on_disk_is_three_members_in_blocks() -> None:
    headers, instance, facts, tokens = 3 * 512, 512, 1024, 1536
    assert sample_bytes(tokens=100, history=60, instance_dim=64) == (
        headers + instance + facts + tokens
    )


def test_size_has_three_digits_and_a_unit() -> None:
    assert [size(n) for n in (999, 1000, 5 * 2**20, 1010 * 2**20)] == [
        "999 bytes",
        "0.977 KiB",
        "5 MiB",
        "0.986 GiB",
    ]

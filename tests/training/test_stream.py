"""The stream a training reads: what is checked when it opens, and which prompts are watched."""

from __future__ import annotations

import itertools
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks import loader
from benchmarks.report import Report
from rellax_ds.config import load_recipe
from rellax_ds.errors import ShardError
from rellax_ds.shards.order import spread
from rellax_ds.shards.read import Sample, ShardReader
from rellax_ds.testing import tiny_tokenizer
from rellax_ds.training.score import Scores
from rellax_ds.training.scored import ScoredPrompts
from rellax_ds.training.stream import PromptStream

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rellax_ds.artifacts import WorkDir


def test_altered_shard_is_refused_at_the_start_or_when_its_sample_is_read(
    recipe_file: Path, make_work: Callable[..., WorkDir], tmp_path: Path
) -> None:
    folder = tmp_path / "5_shards"
    shutil.copytree(make_work().stage_dir("shards"), folder)
    path = folder / "train-00000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b'"label"')] ^= 1
    path.write_bytes(content)
    strict = PromptStream(folder, load_recipe(recipe_file), 0, 1)
    with pytest.raises(ShardError, match="sample 000000000000 differs"):
        strict.verify()
    recipe = load_recipe(recipe_file, ["train.verify=size"])
    quick = PromptStream(folder, recipe, 0, 1)
    quick.verify()
    steps = map(quick.micro_batches, range(quick.steps_per_epoch))
    with pytest.raises(ShardError, match="differs from the index"):
        list(itertools.chain.from_iterable(steps))


def test_stream_taken_up_in_the_middle_of_a_tiled_index_goes_on_as_if_read_from_the_start(
    recipe_file: Path, make_work: Callable[..., WorkDir], tmp_path: Path
) -> None:
    folder = tmp_path / "5_shards"
    loader.tile(make_work().stage_dir("shards"), folder, samples=200)
    recipe = load_recipe(recipe_file)
    whole = PromptStream(folder, recipe, 0, 1)
    assert whole.steps_per_epoch == 216 // 8
    whole.verify()
    read = [[batch.sample_ids.tolist() for _, batch in whole.micro_batches(s)] for s in range(27)]
    assert loader.seek(folder, recipe, 20)["ids"] == read[20][0]
    page = Report("t")
    loader.check_epoch(page, whole, ShardReader.open(folder, "train"), recipe)
    assert not page.failures
    other = recipe.model_copy(update={"seed": recipe.seed + 1})
    loader.check_epoch(page, whole, ShardReader.open(folder, "train"), other)
    assert len(page.failures) == 2


def test_watched_prompts_are_spread_over_the_ids_whatever_their_order() -> None:
    ids = np.array([50, 10, 40, 20, 30])
    assert [int(ids[p]) for p in spread(ids, 3)] == [10, 30, 50]
    assert [int(ids[p]) for p in spread(ids, 9)] == [10, 20, 30, 40, 50]


def test_watched_prompt_is_shown_as_text_without_its_soft_token(tmp_path: Path) -> None:
    path = tiny_tokenizer(tmp_path) / "tokenizer.json"
    words = Tokenizer.from_file(str(path)).encode("Does this viewer like").ids
    tokens = np.full((3, len(words) + 1), -1, np.int32)
    tokens[0] = [*words, words[0]]
    tokens[1, -1] = 4
    sample = Sample("7", tokens, np.zeros(2, np.float32), {"sample": 7, "label": 1})
    watched = ScoredPrompts([sample], str(tmp_path))
    (record,) = watched.prompts()
    assert record["prompt"] == "Does this viewer like"
    logits = np.array([-9.0, np.log(3.0)])
    scores = Scores(np.array([3, 7]), np.array([0, 0]), np.array([0.0, 1.0]), logits, 0 * logits)
    (row,) = watched.rows(5, scores)
    assert row["probability"] == pytest.approx(0.75)
    assert (row["step"], row["sample"], row["label"]) == (5, 7, 1)

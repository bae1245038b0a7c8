"""Recipes: shipped ones load, parents merge, every mistake is one line with key, value, remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rellax_ds.config import Recipe, load_recipe, parse_recipe, recipe_keys, shipped_recipes
from rellax_ds.errors import ConfigError


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_loads_and_names_itself(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_recipe_extends_parent_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 3, micro_batch: 4}\nseed: 7\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {epochs: 5}\n")
    recipe = load_recipe(
        tmp_path / "child.yaml", ["train.learning_rate=1e-4", "shards.valid_rows=null"]
    )
    assert (recipe.name, recipe.seed, recipe.train.epochs, recipe.train.micro_batch) == (
        "child",
        7,
        5,
        4,
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.shards.valid_rows is None


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["train.learning_rte=0.1"],
            ["unknown key 'train.learning_rte'", "0.1", "'train.learning_rate'"],
        ),
        (["trian.epochs=2"], ["unknown key 'trian'", "nearest valid key"]),
        (["train.epochs=many"], ["'train.epochs' is 'many'", "--set train.epochs=many"]),
        (["train.epochs=-1"], ["'train.epochs' is -1", "greater than or equal to 0"]),
        (["shards.train_rows=0"], ["'shards.train_rows' is 0", "greater than or equal to 1"]),
        (["model.interaction=fuller"], ["'model.interaction' is 'fuller'", "'identity'"]),
        (["model.interaction=block", "model.interaction_experts=3"], ["experts 3", "rank 8"]),
        (["model.rank=48"], ["'model'", "rank 48", "interaction_head to factorised"]),
        (["train.global_batch=10", "train.micro_batch=4"], ["global_batch 10", "micro_batch 4"]),
        (
            ["shards.history=retrieved", "shards.history_length=50"],
            ["history_length 50", "num_retrieved"],
        ),
        (["model.train_factors=false"], ["model.train_factors", "B = 0"]),
        (["data.split=[0.5,0.2,0.2]"], ["data.split", "sum to 1"]),
        (["crm.kind=sasrec", "crm.num_heads=3"], ["crm", "embedding_dim 32", "num_heads 3"]),
        (["crm.kind=sim_full", "crm.search_length=31"], ["crm", "31", "history_length 30"]),
        (["crm.kind=bert"], ["crm.kind", "'bert'", "sasrec"]),
        (["seed.x=1"], ["--set seed.x=1"]),
        (["train"], ["--set train", "key=value"]),
    ],
)
def test_override_wrong_is_one_line_with_key_value_and_remedy(
    overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("ml100k_demo", overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n- 2\n", "expected a mapping"),
        ("train: {epochs: [\n", "not valid YAML"),
        ("a: &x {b: 1}\nc: *x\n", "aliases"),
        ("extends: self.yaml\n", "circle"),
        ("extends: nowhere\n", "'nowhere' is not shipped"),
        ("[" * 60 + "]" * 60, "nested deeper"),
    ],
)
def test_recipe_file_wrong_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_recipe(path)


def test_recipe_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="ml100k_demo"):
        load_recipe("ml100k_dmeo")


def test_section_digest_changes_only_with_its_section() -> None:
    one = load_recipe("ml100k_demo")
    two = load_recipe("ml100k_demo", ["train.epochs=9"])
    assert one.section_digest("shards") == two.section_digest("shards")
    assert one.section_digest("train") != two.section_digest("train")
    assert one.digest != two.digest


_VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=5))


@given(key=st.sampled_from(recipe_keys()), value=_VALUES)
def test_recipe_mutated_is_valid_or_a_config_error(key: str, value: object) -> None:
    section, _, field = key.partition(".")
    document = {"name": "x", section: {field: value} if field else value}
    try:
        outcome: object = parse_recipe(document, "mutated")
    except ConfigError as error:
        outcome = str(error)
    assert isinstance(outcome, Recipe) or section in str(outcome)

"""Method recipes: each differs from what it extends in what its method is about, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from rellax_ds.config import load_recipe, recipe_keys, shipped_recipes

FREE = {"name", "description"}
CHANGES: dict[str, tuple[str, set[str]]] = {
    "ml100k_zero_shot": ("ml100k_methods", {"train.epochs"}),
    "ml100k_lora_recent": ("ml100k_methods", set()),
    "ml100k_rella": ("ml100k_methods", {"shards.history"}),
    "ml100k_spa": ("ml100k_methods", {"model.spa"}),
    "ml100k_ilora": ("ml100k_methods", {"model.interaction"}),
    "ml100k_moelora": ("ml100k_methods", {"model.interaction"}),
    "ml100k_reclora": ("ml100k_methods", {"model.interaction"}),
    "ml100k_cflora": ("ml100k_methods", {"model.interaction"}),
    "ml100k_rellax": ("ml100k_methods", {"shards.history", "model.interaction", "model.spa"}),
    "ml100k_rellax_recent": ("ml100k_rellax", {"shards.history"}),
    "ml100k_rellax_folds": ("ml100k_rellax_recent", {"crm.folds"}),
    "ml100k_residual": (
        "ml100k_rellax_folds",
        {"model.residual", "model.interaction_scope"},
    ),
    "ml100k_stacked": ("ml100k_residual", {"model.residual"}),
    "ml100k_two_stage": ("ml100k_rellax", {"model.adapter", "model.train_factors"}),
}


def values(name: str) -> dict[str, Any]:
    """Every dotted key of a recipe and its value."""
    document = load_recipe(name).model_dump(mode="json")
    found = {}
    for key in recipe_keys():
        value: Any = document
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else None
        found[key] = value
    return found


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_method_recipe_differs_from_its_parent_in_the_named_keys_only(name: str) -> None:
    parent, keys = CHANGES[name]
    assert yaml.safe_load(shipped_recipes()[name].read_text())["extends"] == parent
    ours, theirs = values(name), values(parent)
    assert {key for key in ours if ours[key] != theirs[key]} - FREE == keys


def test_method_recipes_are_all_held_to_their_parent() -> None:
    family = set()
    for name, path in shipped_recipes().items():
        parent = yaml.safe_load(path.read_text()).get("extends")
        if parent == "ml100k_methods" or parent in CHANGES:
            family.add(name)
    assert family == set(CHANGES)


def test_two_stage_starts_from_the_adapter_that_rella_writes() -> None:
    assert str(load_recipe("ml100k_two_stage").model.adapter) == (
        "work/ml100k_rella/6_train/adapter"
    )

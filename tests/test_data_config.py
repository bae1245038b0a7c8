"""The data section: what a log can and cannot do is said before anything is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rellax_ds.config import DataConfig, load_recipe, parse_recipe
from rellax_ds.errors import ConfigError

GENERIC = {"dataset": "generic", "events": "e.csv"}
RATED = {"rating": "stars", "time": "at"}


def data(**fields: Any) -> DataConfig:
    return parse_recipe({"name": "t", "data": fields}, "t").data


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "movielens-1m"}, "movielens-1m is not fetched by name; set data.path"),
        ({"dataset": "generic"}, "needs data.events and data.columns"),
        (GENERIC, "needs data.events and data.columns"),
        ({"events": "e.csv"}, "events belongs to dataset generic, this is movielens-100k"),
        ({"drop_implicit": True}, "drop_implicit belongs to bookcrossing"),
        ({**GENERIC, "columns": {}}, "one of the columns rating and label, and not both"),
        (
            {**GENERIC, "columns": {"rating": "r", "label": "l"}},
            "one of the columns rating and label, and not both",
        ),
        (
            {**GENERIC, "columns": {"rating": "r"}},
            "no times, so they cannot be split by time; set split_by user or columns.time",
        ),
        (
            {"dataset": "bookcrossing", "path": "x"},
            "no times, so they cannot be split by time; set split_by user",
        ),
        (
            {**GENERIC, "columns": {"rating": "r"}, "split_by": "user", "strict_time": True},
            "strict_time needs times",
        ),
        ({"samples_per_user": "last"}, "samples_per_user last needs split_by user"),
        ({"split_by": "user", "freeze_history": True}, "needs split_by time"),
        ({**GENERIC, "columns": {**RATED, "item_text": {"title": "t"}}}, "give that file"),
        ({**GENERIC, "columns": {**RATED, "user_fields": {"age": "t"}}}, "give that file"),
        (
            {**GENERIC, "items": "i", "columns": {**RATED, "item_text": {"item_id": "t"}}},
            "item_text cannot be called 'item_id'",
        ),
        (
            {**GENERIC, "users": "i", "columns": {**RATED, "user_fields": {"a b": "t"}}},
            "user_fields cannot be called 'a b'",
        ),
        ({**GENERIC, "columns": {**RATED, "usr": "u"}}, "nearest valid key is 'data.columns.user'"),
    ],
)
def test_data_impossible_combination_is_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        data(**fields)
    assert "\n" not in str(caught.value)


def test_data_column_can_be_set_on_the_command_line(tmp_path: Any) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text("data: {dataset: generic, events: e.csv, columns: {rating: r, time: t}}\n")
    recipe = load_recipe(path, ["data.columns.time_unit=ms"])
    assert recipe.data.columns is not None
    assert (recipe.data.columns.time_unit, recipe.data.columns.user) == ("ms", "user_id")


@pytest.mark.parametrize(
    ("fields", "rule", "likes"),
    [
        ({}, "above 3", [False, False, True, True]),
        ({"label_threshold": 3.5}, "above 3.5", [False, False, False, True]),
        (
            {"label_threshold": 3, "label_inclusive": True},
            "of 3 or more",
            [False, True] + [True] * 2,
        ),
        ({**GENERIC, "columns": {"label": "l", "time": "t"}}, "of 1", [False, True, True, True]),
    ],
)
def test_data_like_rule_and_likes_agree(
    fields: dict[str, Any], rule: str, likes: list[bool]
) -> None:
    found = data(**fields)
    assert found.like_rule == rule
    assert found.likes(np.array([0.0, 3.0, 3.5, 5.0])).tolist() == likes

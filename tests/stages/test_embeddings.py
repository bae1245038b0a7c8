"""What stage 2 declares: `backbone` names the recipe's model, and its content is part of the
key.
"""

import pytest

from rellax_ds.config import parse_recipe
from rellax_ds.stages.embeddings import STAGE


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def recipe(encoder, backbone):
    document = {"embeddings": {"encoder": str(encoder)}, "model": {"backbone": str(backbone)}}
    return parse_recipe({"name": "t", **document}, "t")


def test_identities_backbone_means_the_model_of_the_recipe(model, tmp_path):
    absent = tmp_path / "absent"
    assert STAGE.identities(recipe("backbone", model)) == STAGE.identities(recipe(model, absent))


def test_identities_changed_model_file_changes_the_key(model):
    before = STAGE.identities(recipe(model, model))
    (model / "config.json").write_text("{ }")
    assert STAGE.identities(recipe(model, model)) != before

"""Item text: the template's fields become the item's columns, and mistakes name the valid ones."""

import pyarrow as pa
import pytest

from rellax_ds.errors import ConfigError
from rellax_ds.retrieval.item_text import render

ITEMS = pa.table(
    {
        "item": pa.array([0, 1, 2, 3], pa.int32()),
        "title": ["Alien (1979)", "A {brace} %s", " ", "Last"],
        "genre": ["Horror", "Drama", "Comedy", ""],
    }
)


def test_render_fields_and_braces_are_filled():
    texts = render(ITEMS, "{{{title}}} - {genre}.").to_pylist()
    assert texts == ["{Alien (1979)} - Horror.", "{A {brace} %s} - Drama.", "", "{Last} - ."]


def test_render_item_without_any_named_field_has_no_text():
    assert render(ITEMS, "Genre: {genre}").to_pylist()[2:] == ["Genre: Comedy", ""]


def test_render_number_column_is_written_out():
    assert render(ITEMS, "{item}:{title}").to_pylist()[0] == "0:Alien (1979)"


def test_render_unknown_column_is_refused_naming_the_valid_ones():
    with pytest.raises(ConfigError, match=r"'\{year\}' is no column.*item, title, genre"):
        render(ITEMS, "{title} {year}")


@pytest.mark.parametrize("template", ["no field", "{title", "{}", "{title!r}", "{title:>9}"])
def test_render_template_that_cannot_be_used_is_refused(template):
    with pytest.raises(ConfigError, match=r"embeddings\.text"):
        render(ITEMS, template)

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rellax_ds.errors import ConfigError
from rellax_ds.prompts.templates import Template, load_template, shipped_templates

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """
history: "Like {title}{soft}?{answer}\\n"
target: "Like {title}{soft}?"
answers: {"yes": " Yes", "no": " No"}
"""


@pytest.mark.parametrize(
    "name", ["plain", "question_answer", "vicuna_compat", "vicuna_compat_books"]
)
def test_shipped_template_loads_and_survives_its_document(name: str) -> None:
    assert name in shipped_templates()
    template = load_template(name)
    again = Template(**template.document())
    assert again == template
    assert again.digest == template.digest


def test_pieces_of_a_line_are_cut_at_the_fields_that_stand_alone() -> None:
    line = Template("t", "{index}) {title}: {rating}{soft}\n", "Like {title}{soft}?", " Yes", " No")
    kinds = [piece.kind for piece in line.pieces("history")]
    assert kinds == ["index", "text", "rating", "soft", "text"]
    # The blank before a value belongs to the value, where a byte-level tokenizer puts it.
    assert line.pieces("history")[2].parts == ((" ", None),)
    assert line.pieces("target")[-1].tail == "?"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{soft}?{answer}", "?{answer}"), "'history' holds {soft} 0 times"),
        (("target: ", "targets: "), "unknown key 'targets'; the nearest valid key is 'target'"),
        (("?{answer}", "? {answer}"), "bring their own"),
        (("{title}{soft}?{", "{title.upper}{soft}?{"), "a field is a plain name"),
        (("{title}{soft}?{", "{title!r}{soft}?{"), "a field is a plain name"),
        (("Like {title}{soft}?{", "Like {title{soft}?{"), "write {{ for a brace"),
        (('{soft}?"', '{soft}{rating}?"'), "'target' may not hold {rating}"),
        (('" Yes"', "true"), "expected two quoted keys"),
        (('" No"', '" Yes"'), "the answers are both"),
        (('" No"', '"No "'), "without trailing blanks"),
    ],
)
def test_template_with_a_mistake_is_refused_with_its_place(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert load_template(path).name == "mine"
    assert GOOD.replace(*change, 1) != GOOD
    path.write_text(GOOD.replace(*change, 1))
    with pytest.raises(ConfigError, match="mine") as caught:
        load_template(path)
    assert said in str(caught.value)


def test_template_of_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match="choose one of plain, question_answer"):
        load_template("plane")

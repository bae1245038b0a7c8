"""report.md: the findings as Markdown, for papers and pull requests.

The same figures and sentences as the page, without its charts and without example prompts, which
quote rows of the log.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rellax_ds.evaluation.words import interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>#|"} | {"\n": " "})


def render_markdown(
    document: dict[str, Any], titles: Mapping[str, str], group_titles: Mapping[str, str]
) -> str:
    """The report as Markdown text.

    Args:
        document: What `findings.find` returned, with its `statements`.
        titles: Column titles by metric, in order.
        group_titles: Captions by what rows are grouped by.
    """
    models = document["models"]
    ours = next(r for r in document["results"] if (r["split"], r["model"]) == ("test", "rellax"))
    label = document["test_label"]
    lines = [f"# {_text(document['name'])}", ""]
    if document["description"]:
        lines += [_text(document["description"]), ""]
    lines += [
        f"**{_text(document['model'])}: {label} AUC {interval(ours['auc'])}** (95 % interval by"
        f" user; {ours['n']:,} rows of {ours['users']:,} users)",
        "",
    ]
    for kind in ("result", "protocol"):
        lines += [f"- {_text(sentence)}" for sentence in document["statements"][kind]] + [""]
    for split in document["rows"]:
        rows = [
            [models[r["model"]], *(interval(r[m]) for m in titles), f"{r['ece']:.3f}"]
            for r in document["results"]
            if r["split"] == split
        ]
        name = label if split == "test" else split
        lines += [f"## Models on the scored {name} rows", ""]
        lines += [table_text(["model", *titles.values(), "ECE"], rows), ""]
        gaps = [
            [f"{models[r['model']]} minus {models[r['minus']]}", *(interval(r[m]) for m in titles)]
            for r in document["differences"]
            if r["split"] == split
        ]
        lines += ["Paired differences:", "", table_text(["", *titles.values()], gaps), ""]
    for by, members in groupby(document["groups"], key=lambda group: group["by"]):
        groups = [group for group in members if group["n"]]
        rows = [
            [title, *(interval(group["auc"].get(key)) for group in groups)]
            for key, title in models.items()
        ]
        heads = [f"{group['group']} ({group['n']:,} rows)" for group in groups]
        lines += [f"## {group_titles[by]}", "", table_text(["model", *heads], rows), ""]
    stages = [
        [s["stage"], f"{s['seconds']:.1f}", s["content"][:12], (s["commit"] or "")[:12]]
        for s in document["stages"]
    ]
    lines += ["## Stages", "", table_text(["stage", "seconds", "content", "commit"], stages), ""]
    lines += [f"Recipe digest `{document['recipe_digest']}`.", ""]
    return "\n".join(lines)


def table_text(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its first column left and the others right; cells are escaped."""
    cells = [[_text(cell) for cell in row] for row in (header, *rows)]
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:]))


def _text(value: object) -> str:
    return str(value).translate(_SPECIAL)

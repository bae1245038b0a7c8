"""The page: whole, escaped, self-contained, the same for the same findings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from rellax_ds.config import parse_recipe
from rellax_ds.evaluation import charts, report, words
from rellax_ds.evaluation.findings import find
from rellax_ds.evaluation.words import interval

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.evaluation.findings import Evidence

VOID = {"meta", "br", "use", "path", "rect"}


class Page(HTMLParser):
    """Collects text and attributes and checks that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(evidence: Evidence, folder: Path) -> tuple[str, dict[str, Any]]:
    report.write(find(evidence), folder)
    document = json.loads((folder / "report.json").read_text())
    return (folder / "report.html").read_text(encoding="utf-8"), document


def test_page_fetches_nothing_and_closes_every_element(evidence: Evidence, tmp_path: Path) -> None:
    html, _ = page_of(evidence, tmp_path)
    page = Page(html)
    for tag, name, value in page.attributes:
        if name in {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}:
            assert value.startswith("#"), (tag, name, value)
            assert value[1:] in page.ids
        assert not name.startswith("on"), (tag, name)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", html)
    assert re.search(r"url\((?!#)", html) is None
    assert "<script" not in html
    assert len(page.ids) == len(set(page.ids))
    assert html.count("<svg") == 6


def test_page_holds_every_figure_of_the_json(evidence: Evidence, tmp_path: Path) -> None:
    html, document = page_of(evidence, tmp_path)
    text = Page(html).text

    def plain(value: float) -> str:
        return f"{value:.3f}".removeprefix("0")

    for row in document["results"] + document["full_split"]:
        for metric in report.METRICS:
            estimate = row[metric]
            low, high = plain(estimate["low"]), plain(estimate["high"])
            assert f"{plain(estimate['value'])} {low}\N{EN DASH}{high}" in text
        assert plain(row["ece"]) in text
        assert f"{row['n']:,}" in text
    for row in document["differences"]:
        for metric in ("auc", "log_loss", "gauc"):
            assert plain(abs(row[metric]["value"])) in text
    for group in document["groups"]:
        shown = f"{group['n']:,} rows, {group['users']:,} users" in text
        assert shown == (group["n"] > 0)
    for sentence in document["statements"]["result"] + document["statements"]["protocol"]:
        assert " ".join(sentence.split()) in text
    for needed in (
        "3.18 4.62",  # heterogeneity, recent
        "2.55 3.73",
        "0 (zero-shot) .611 .700 .500",
        "3 .722 .600 .600",
        "1 min 2 s",  # stage 1 took 61.5 s
        "1.25 GiB",
        "c0ffee012345+",
        document["recipe_digest"],
        "torch 2.13.0",
        "bootstrap: 60",
        "GroupLens Research",
        "Liked: yes; probability .888, before training .444",
        "Seen <b>it</b>? Yes",
        "by 0.020 (standard deviation)",
    ):
        assert needed in text, needed
    assert all(f"{n} {stage['stage']}" in text for n, stage in enumerate(document["stages"], 1))


def test_page_escapes_what_people_write(evidence: Evidence, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"'&"
    document = evidence.recipe.model_dump(mode="json") | {"name": attack, "description": attack}
    document["embeddings"]["text"] = "</pre><img src=x>{title}"
    manifests = dict(evidence.manifests)
    manifests["tables"] = replace(manifests["tables"], counts={attack: 1}, commit="<b>bold")
    hostile = replace(
        evidence,
        recipe=parse_recipe(document, "test"),
        manifests=manifests,
        heterogeneity={attack: {"5": 3.0, "10": 4.0}, "recent": {"5": 3.0, "10": 4.0}},
    )
    html, _ = page_of(hostile, tmp_path)
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>bold" not in html
    page = Page(html)
    assert page.text.count("<script>alert(1)</script>") >= 4


def test_markdown_holds_every_figure_and_no_prompt(evidence: Evidence, tmp_path: Path) -> None:
    attack = "a|b <script> *bold*"
    named = parse_recipe(evidence.recipe.model_dump(mode="json") | {"name": attack}, "test")
    _, document = page_of(replace(evidence, recipe=named), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for row in document["results"] + document["differences"]:
        for metric in report.METRICS:
            assert interval(row[metric]) in text
    assert text.startswith("# a\\|b \\<script\\> \\*bold\\*\n")
    assert "Seen" not in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith("| model | AUC")}
    assert widths == {len(report.METRICS) + 1}


def test_page_is_the_same_for_the_same_findings(evidence: Evidence, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        page_of(evidence, folder)
    for name in ("report.html", "report.json", "report.md"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_page_without_curves_or_gauc_still_renders(evidence: Evidence, tmp_path: Path) -> None:
    found = find(replace(evidence, training=[], heterogeneity={}, gates=[]))
    for row in found["results"] + found["differences"]:
        row["gauc"] = None
    report.write(found, tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not defined" in Page(html).text
    assert html.count("<svg") == 2


def test_chart_keeps_text_labels_and_their_digits() -> None:
    svg = charts.interval_chart("AUC", "AUC, 95 % interval", [("a < b", 0.7731, 0.71, 0.82)])
    page = Page(svg)
    assert "a < b" in page.text
    assert "0.773" in page.text
    assert "AUC, 95 % interval" in page.text
    assert "#0" not in re.sub(r"url\(#\w+\)", "", svg)  # no fixed colour is left
    assert ("svg", "aria-label", "AUC") in page.attributes


@pytest.mark.parametrize(
    ("metric", "low", "high", "value", "verdict"),
    [
        ("auc", 0.01, 0.03, 0.02, "ahead"),
        ("auc", -0.03, -0.01, -0.02, "behind"),
        ("log_loss", -0.03, -0.01, -0.02, "ahead"),
        ("log_loss", 0.01, 0.03, 0.02, "behind"),
        ("auc", -0.01, 0.03, 0.02, "not separated"),
        ("auc", 0.0, 0.0, 0.0, "not separated"),
    ],
)
def test_verdict_follows_the_interval_and_the_metrics_direction(
    metric: str, low: float, high: float, value: float, verdict: str
) -> None:
    assert words.verdict(metric, {"value": value, "low": low, "high": high}) == verdict

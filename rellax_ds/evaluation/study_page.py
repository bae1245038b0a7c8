"""study.json, study.md and study.html: the findings of a study for machines, terminals and readers.

The two pages hold the same table and sentences. Every table says which rows the recommender was
trained on, because a method that reads it is not few-shot, whatever its shots.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from rellax_ds.artifacts import write_bytes, write_json
from rellax_ds.evaluation import charts, words
from rellax_ds.evaluation.markdown import table_text
from rellax_ds.evaluation.report import (
    ACKNOWLEDGEMENT,
    DEQUANTISED,
    FEW_USERS,
    TITLES,
    template,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_METRICS = ("auc", "log_loss", "gauc")
_DASH = "\u2013"
_SEED = re.compile(r"(?<=\d-)(s\d+)(?=-|$)")
"""The seed in a run's name (`study.cell_name`), after the number of shots."""


def write(findings: dict[str, Any], directory: Path) -> None:
    """Write study.json, study.md and study.html.

    Args:
        findings: What `study.find` returned.
        directory: Where the files go.
    """
    document = findings | {"statements": statements(findings)}
    write_json(directory / "study.json", document)
    write_bytes(directory / "study.md", markdown(document).encode())
    write_bytes(directory / "study.html", render(document).encode())


def statements(findings: dict[str, Any]) -> list[str]:
    """Plain sentences on what was compared and how sure it is."""
    rows = list(findings["rows"].values())
    seeds = ", ".join(str(seed) for seed in findings["seeds"])
    sizes = sorted({part["n"] for part in rows})
    notes = findings["notes"]
    found = [
        f"Test rows: {' or '.join(f'{size:,}' for size in sizes)} a seed, {findings['users']:,} "
        f"users over all seeds ({seeds}). A seed draws the shots, the scored rows and the start of "
        "every model. All methods of a seed are scored on the same rows.",
        "Figures are means over the seeds. Intervals are 95 % percentile intervals over "
        f"{findings['resamples']:,} resamples of users, all seeds at once; differences are taken "
        "seed by seed inside each resample. The spread between seeds (standard deviation) stands "
        "beside them and is not in them. Intervals are not corrected for the number of methods.",
        _crm_statement(findings),
        "Adapters are chosen on the valid rows, the recommender's epoch on the valid split; test "
        "rows are scored with what was chosen.",
    ]
    reads = findings["test_reads"]
    if reads["shown"]:
        others = reads["scorings"] - reads["shown"]
        found.append(
            f"Test rows were scored once for each of {reads['shown']} models shown, from "
            f"{reads['first']} to {reads['last']}."
            + (
                f" Scorings in this folder of models that are not shown: {others}. Who chose "
                "between those has used the test rows."
                if others
                else ""
            )
        )
    if True in notes["centred"]:
        found.append(
            "One constant was subtracted from the logits of each LLM so that their mean on valid "
            "fits the shots' share of likes, also zero-shot; it moves LogLoss, not AUC or GAUC."
        )
    if notes["residuals"]:
        found.append(
            "Methods with model.residual add the LLM's logit to the recommender's by three numbers "
            "fitted on the valid rows; this is not part of the published methods. “LLM alone” is "
            "the LLM's own logit out of that sum; a seed whose fit gave it no weight is left out."
        )
    if any(weight > 0 for weight in notes["history_weights"]):
        found.append(
            "Training also supervises the answers of the history's own questions; this is not part "
            "of the published methods."
        )
    if DEQUANTISED in notes["backbones"]:
        found.append("SmolLM2-135M-Instruct is dequantised from a 4-bit file, not the original.")
    if False in notes["frozen_histories"]:
        found.append("Histories stream: they hold all events before the target, also of test.")
    if findings["users"] < FEW_USERS:
        found.append(
            f"There are only {findings['users']} users: with fewer than {FEW_USERS} a bootstrap by "
            "user tends to be too narrow."
        )
    if findings["missing"]:
        found.append(
            f"{len(findings['missing'])} of {findings['runs']} runs are not finished: "
            f"{', '.join(_by_cell(findings['missing']))}."
        )
    return found


def _by_cell(runs: Sequence[str]) -> list[str]:
    """Names of runs, those that differ in the seed alone as one: `full-K5-n800-s1/s2`."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in runs:
        head, seed, tail = _SEED.split(name, maxsplit=1)
        found.setdefault((head, tail), []).append(seed)
    return [f"{head}{'/'.join(seeds)}{tail}" for (head, tail), seeds in found.items()]


def _crm_statement(findings: dict[str, Any]) -> str:
    seen = sorted({(row["rows"], row["train_rows"]) for row in findings["recommenders"]})
    parts = [
        f"all {rows:,} training rows (the full training set)"
        if rows == of
        else f"{rows:,} of {of:,} training rows"
        for rows, of in seen
    ]
    return (
        f"The recommender (CRM) was trained on {' or '.join(parts)}. Methods with an entry under "
        "“CRM saw” read its item embeddings, h or logit: with it they are not few-shot, whatever "
        "their shots."
    )


def crm_saw(row: dict[str, Any]) -> str:
    """What a table says of the recommender that a method reads."""
    crm = row.get("crm", {**row, "used": True})
    if not crm["used"]:
        return _DASH
    whole = "full train" if crm["rows"] == crm["train_rows"] else f"of {crm['train_rows']:,}"
    return f"{crm['rows']:,} ({whole})"


def seeds_of(row: dict[str, Any]) -> str:
    """Seeds of a row, those that are missing named."""
    text = ", ".join(str(seed) for seed in row["seeds"])
    missing = ", ".join(str(seed) for seed in row.get("missing_seeds", []))
    return f"{text} (missing: {missing})" if missing else text


def markdown(document: dict[str, Any]) -> str:
    """The tables and the sentences as Markdown."""
    blocks = [f"# {document['name']}", document["description"], table(document)]
    blocks += ["\n".join(f"- {sentence}" for sentence in document["statements"])]
    parts = contrast_table(document)
    if parts:
        blocks += ["## What each part is worth", parts, CONTRAST_NOTE]
    blocks += ["## With the recommender's logit added", blend_table(document), BLEND_NOTE]
    labels = label_table(document)
    if labels:
        blocks += ["## What the histories say without an LLM", labels, LABELS_NOTE]
    grouped = group_table(document)
    if grouped:
        blocks += ["## By length of history", grouped, GROUP_NOTE]
    header = ["method", "K", "shots", "trained parameters", "steps", "training s", "steps alone s"]
    header += ["scoring ms a row", "CRM saw"]
    costs = [_cost(row) for row in document["results"] if not row["derived"]]
    blocks += ["## Cost", table_text(header, costs), _COST_NOTE]
    return "\n\n".join(block for block in blocks if block) + "\n"


def table(document: dict[str, Any]) -> str:
    """Every method and recommender as a Markdown table."""
    header = ["method", "K", "shots", "seeds", *(TITLES[name] for name in _METRICS)]
    header += ["AUC over seeds", f"AUC minus {document['reference']}", MINUS_CRM, "CRM saw"]
    return table_text(
        header, [_cells(row) for row in document["results"] + document["recommenders"]]
    )


def contrast_table(document: dict[str, Any]) -> str:
    """What each part is worth as a Markdown table; empty without pairs."""
    entries = document["contrasts"]
    if not entries:
        return ""
    names = _defined(group for entry in entries for group in entry["groups"])
    header = ["part", "method", "without it", "K", "shots", "seeds", "AUC", "LogLoss"]
    rows = [
        [
            entry["part"],
            entry["method"],
            entry["without"],
            str(entry["history_length"]),
            f"{entry['shots']:,}",
            seeds_of(entry),
            f"{words.signed(entry['auc'])}, {words.verdict('auc', entry['auc'])}",
            words.signed(entry["log_loss"]),
            *(words.signed(g["auc"]) for g in entry["groups"] if g["group"] in names),
        ]
        for entry in entries
    ]
    return table_text(header + [f"AUC, {name} events" for name in names], rows)


def blend_table(document: dict[str, Any]) -> str:
    """Every LLM with its recommender's logit added, as a Markdown table."""
    header = ["method", "K", "shots", "seeds", "weight of the LLM", "AUC", "LogLoss", MINUS_CRM]
    rows = [
        [
            entry["label"],
            str(entry["history_length"]),
            f"{entry['shots']:,}",
            seeds_of(entry),
            weights_of(entry),
            words.interval(entry["auc"]),
            words.interval(entry["log_loss"]),
            words.signed(entry["minus_crm"]),
            words.signed(entry["minus_reference"]) if entry["minus_reference"] else _DASH,
        ]
        for entry in document["blends"]
    ]
    return table_text([*header, f"AUC minus {document['reference']} likewise"], rows)


def weights_of(entry: dict[str, Any]) -> str:
    """Fitted weights by seed."""
    return ", ".join(f"{weight:.2f}" for weight in entry["weights"])


def label_table(document: dict[str, Any]) -> str:
    """What labels of the last and of the most similar K say, as a Markdown table."""
    entries = document["history_labels"]
    if not entries:
        return ""
    names = _defined(group for entry in entries for group in entry["groups"])
    header = ["K", "AUC of the last K", "AUC of the most similar K", "difference"]
    rows = [
        [
            str(entry["history_length"]),
            words.interval(entry["recent"]),
            words.interval(entry["similar"]),
            f"{words.signed(entry['auc'])}, {words.verdict('auc', entry['auc'])}",
            *(words.signed(g["auc"]) for g in entry["groups"] if g["group"] in names),
        ]
        for entry in entries
    ]
    return table_text(header + [f"{name} events" for name in names], rows)


def group_table(document: dict[str, Any]) -> str:
    """AUC by length of history as a Markdown table; empty without a defined group.

    A cell of the table holds the AUC and, where there is one, the paired difference to the
    reference.
    """
    names, rows = by_group(document)
    if not names:
        return ""

    def text(entry: dict[str, Any]) -> str:
        gap = entry["minus_reference"]
        if gap is None:
            return words.interval(entry["auc"])
        return f"{words.plain(entry['auc']['value'])}, {words.signed(gap)}"

    header = ["method", "K", "shots", *(f"{name} events ({users})" for name, users in names)]
    return table_text(header, [[*head, *map(text, entries)] for head, entries in rows])


Grouped = tuple[list[tuple[str, str]], list[tuple[list[str], list[dict[str, Any]]]]]


def by_group(document: dict[str, Any]) -> Grouped:
    """The groups of history length that some cell has a figure for, with how many users at most,
    and each cell with its entries in those groups, in the order of the results.
    """
    groups = document["groups"]
    names = _defined(groups)
    users = {n: max(entry["users"] for entry in groups if entry["group"] == n) for n in names}
    rows: dict[tuple[str, int, int], list[dict[str, Any]]] = {
        (row["label"], row["history_length"], row["shots"]): [] for row in document["results"]
    }
    for entry in groups:
        if entry["group"] in users:
            rows[entry["label"], entry["history_length"], entry["shots"]].append(entry)
    return [(name, f"up to {users[name]:,} users") for name in names], [
        ([label, str(length), f"{shots:,}"], entries)
        for (label, length, shots), entries in rows.items()
    ]


def _defined(groups: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the groups with a figure, in order."""
    return list(dict.fromkeys(group["group"] for group in groups if group["auc"]))


MINUS_CRM = "AUC minus its CRM"

CONTRAST_NOTE = (
    "Paired differences of two methods that differ in the part alone, on the same rows and the "
    "seeds both have; by how many events the user had before the target. Intervals are 95 % over "
    "resampled users and not corrected for the number of rows here; a difference of LogLoss is "
    "better when negative."
)

GROUP_NOTE = (
    "Test AUC of the rows whose user had so many events before the target: with its interval for "
    "the reference, with the paired difference to the reference and its interval for the others. "
    "Retrieval changes a prompt only where the history is longer than K."
)

BLEND_NOTE = (
    "Each LLM's logit added to its recommender's: a times the recommender's plus the weight times "
    "the LLM's plus b, the three numbers fitted on the valid rows of the seed. An LLM that never "
    "read the recommender is blended likewise: what a method gains by reading it must show here."
)

LABELS_NOTE = (
    "The mean label of K events of the history as the score: of the last K, and of the K that SUBR "
    "finds most similar to the target. It needs no LLM and no training, and says what retrieval "
    "gives up or gains before the text is read; the difference also by how many events the user "
    "had before the target."
)

_COST_NOTE = (
    "Means over seeds, from the manifests and the training log; where runs share a training or a "
    "scoring, its time is given for each. The recommender and the data path are not counted."
)


def _cells(row: dict[str, Any]) -> list[str]:
    gap = row["minus_reference"]
    return [
        row["label"],
        str(row.get("history_length", _DASH)),
        f"{row['shots']:,}" if "shots" in row else _DASH,
        seeds_of(row),
        *(words.interval(row[name]) for name in _METRICS),
        _spread(row),
        f"{words.signed(gap['auc'])}, {words.verdict('auc', gap['auc'])}" if gap else _DASH,
        words.signed(row["minus_crm"]["auc"]) if row.get("minus_crm") else _DASH,
        crm_saw(row),
    ]


def _spread(row: dict[str, Any]) -> str:
    found = (row.get("spread") or {}).get("auc")
    if found is None:
        return _DASH
    low, high = words.plain(found["min"]), words.plain(found["max"])
    return f"sd {words.plain(found['std'])}, {low} to {high}"


def _cost(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds"]
    return [
        row["label"],
        str(row["history_length"]),
        f"{row['shots']:,}",
        f"{row['trained_parameters']:,}",
        f"{row['steps']:,}",
        f"{seconds['train']:.1f}",
        f"{seconds['steps']:.1f}",
        f"{1000 * seconds['predict_per_row']:.1f}",
        crm_saw(row),
    ]


def render(document: dict[str, Any]) -> str:
    """The page, as HTML text that fetches nothing."""
    page = template(
        "study.html.j2",
        seeds=seeds_of,
        weights=weights_of,
        crm_saw=crm_saw,
        cost=_cost,
        two_lines=words.two_lines,
    )
    return page.render(
        document,
        metrics=_METRICS,
        titles=TITLES,
        minus_crm=MINUS_CRM,
        charts={name: Markup(svg) for name, svg in draw(document).items()},
        cost_note=_COST_NOTE,
        group_note=GROUP_NOTE,
        grouped=by_group(document),
        contrast_note=CONTRAST_NOTE,
        blend_note=BLEND_NOTE,
        labels_note=LABELS_NOTE,
        label_groups=_defined(g for one in document["history_labels"] for g in one["groups"]),
        contrast_groups=_defined(g for entry in document["contrasts"] for g in entry["groups"]),
        acknowledgement=ACKNOWLEDGEMENT if _is_movielens(document) else "",
    )


def _is_movielens(document: dict[str, Any]) -> bool:
    return any(name.startswith("movielens") for name in document["notes"]["datasets"])


def draw(document: dict[str, Any]) -> dict[str, str]:
    """The charts by name; one without data is left out."""
    results = document["results"]
    drawn = {}
    for name, axis, words_of_axis in (
        ("history", "history_length", "K, history items"),
        ("shots", "shots", "shots"),
    ):
        series = _series(document["curves"][axis], "K" if axis == "shots" else "shots")
        if series:
            drawn[name] = charts.series_chart(
                f"Test AUC over {words_of_axis}",
                words_of_axis,
                "test AUC",
                series,
                doubling=axis == "shots",
            )
    at = main_point(results)
    here = [row for row in results if (row["history_length"], row["shots"]) == at]
    here.sort(key=lambda row: row["label"] != document["reference"])
    drawn["ablation"] = charts.interval_chart(
        "Test AUC by method", "test AUC, 95 % interval", [_bar(r["label"], r["auc"]) for r in here]
    )
    gaps = [(r["label"], r["minus_reference"]["auc"]) for r in here if r["minus_reference"]]
    if gaps:
        drawn["gaps"] = charts.interval_chart(
            "Difference to the reference",
            f"test AUC minus {document['reference']}, 95 % interval",
            [_bar(*gap) for gap in gaps],
            differences=True,
        )
    parts = [c for c in document["contrasts"] if (c["history_length"], c["shots"]) == at]
    if parts:
        drawn["parts"] = charts.interval_chart(
            "What each part is worth",
            "difference of test AUC, 95 % interval",
            [_bar(entry["part"], entry["auc"]) for entry in parts],
            differences=True,
        )
    labels = document["history_labels"]
    if len(labels) > 1:
        lengths = [entry["history_length"] for entry in labels]
        drawn["labels"] = charts.series_chart(
            "AUC of the mean label by K",
            "K, history items",
            "test AUC",
            [
                charts.Series(
                    name,
                    lengths,
                    *([entry[key][part] for entry in labels] for part in ("value", "low", "high")),
                )
                for name, key in (("last K", "recent"), ("most similar K", "similar"))
            ],
        )
    if document["heterogeneity"]:
        drawn["heterogeneity"] = charts.line_chart(
            "Distinct genres in the history by K",
            "K, history items",
            "mean number of genres",
            [_by_size(name, by_k) for name, by_k in document["heterogeneity"].items()],
        )
    for name, key, label, scale in (
        ("training_cost", "steps", "seconds of training steps", 1.0),
        ("scoring_cost", "predict_per_row", "milliseconds to score a row", 1000.0),
    ):
        drawn[name] = charts.cost_chart(
            f"Test AUC over {label}",
            label,
            "test AUC",
            [
                (row["label"], scale * row["seconds"][key], *_bar(row["label"], row["auc"])[1:])
                for row in here
                if not row["derived"]
            ],
        )
    return drawn


def main_point(results: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """K and shots that most methods were run at; the larger of equals."""
    counted = Counter((row["history_length"], row["shots"]) for row in results)
    return max(counted, key=lambda point: (counted[point], point))


def _series(lines: Sequence[dict[str, Any]], other: str) -> list[charts.Series]:
    """The lines over one axis; each with the value of the other where there are several."""
    several = len({line["at"] for line in lines}) > 1
    return [
        charts.Series(
            f"{line['label']}, {other} {line['at']:,}" if several else line["label"],
            line["x"],
            *([auc[part] for auc in line["auc"]] for part in ("value", "low", "high")),
        )
        for line in lines
    ]


def _bar(label: str, estimate: dict[str, float]) -> tuple[str, float, float, float]:
    return label, estimate["value"], estimate["low"], estimate["high"]


def _by_size(name: str, by_k: dict[str, float]) -> charts.Line:
    sizes = sorted(by_k, key=int)
    return charts.Line(name, [int(k) for k in sizes], [by_k[k] for k in sizes], marks=True)

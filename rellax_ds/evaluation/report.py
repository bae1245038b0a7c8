"""report.html: the findings as one page that needs nothing else.

No script, no font and no image is fetched; every value is escaped by the template engine, since
recipe names and titles are written by people. Sentences that need a judgement (who is ahead, what
the recommender saw) are composed here from the figures, so the page cannot say more than they do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from rellax_ds.artifacts import write_bytes, write_json
from rellax_ds.evaluation import charts, test_reads, words
from rellax_ds.evaluation.markdown import render_markdown
from rellax_ds.evaluation.significance import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TITLES = {
    "auc": "AUC",
    "log_loss": "LogLoss",
    "accuracy": "ACC",
    "gauc": "GAUC",
    "ndcg_10": "NDCG@10",
}
"""Column titles of the metrics."""

GROUP_TITLES = {
    "user": "AUC by user: warm users have training rows, cold users have none.",
    "history": "AUC by the number of events in the user's history.",
    "target": "AUC by the number of training rows that have the target item.",
}
"""Captions of the tables of groups."""

ACKNOWLEDGEMENT = (
    "Data: MovieLens, GroupLens Research, University of Minnesota (F. M. Harper and J. A. Konstan, "
    "The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015). Its terms allow research "
    "use with acknowledgement and no redistribution. Example prompts quote rows of the log: leave "
    "them out of what you publish."
)
_SMOOTH_STEPS = 10
_MOST_LINES = 3
# Measured on planted scores: nominal 95 % covers 85 % with 6 users, 90 % with 20, 93 % with 30.
FEW_USERS = 30
DEQUANTISED = "smollm2-135m-instruct"


def write(findings: dict[str, Any], directory: Path) -> None:
    """Write report.json, report.html and report.md.

    Args:
        findings: What `findings.find` returned.
        directory: Where the files go.
    """
    document = findings | {"statements": statements(findings)}
    write_json(directory / "report.json", document)
    write_bytes(directory / "report.html", render(document).encode())
    write_bytes(directory / "report.md", render_markdown(document, TITLES, GROUP_TITLES).encode())


def render(document: dict[str, Any]) -> str:
    """The page, as HTML text."""
    return template("report.html.j2").render(
        document,
        metrics=METRICS,
        titles=TITLES,
        group_titles=GROUP_TITLES,
        verdict=words.verdict,
        charts=_draw(document),
        heterogeneity_at=_by_size(document["heterogeneity"].get("recent", {})),
        recipe_yaml=_yaml(document["recipe"]),
        counts_yaml=_yaml({stage["stage"]: stage["counts"] for stage in document["stages"]}),
        acknowledgement=ACKNOWLEDGEMENT,
    )


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """A page's template: values are escaped, and one that is missing is an error.

    Args:
        name: File beside this one.
        **filters: Filters by name, beside those that write figures.
    """
    environment = Environment(
        loader=PackageLoader("rellax_ds", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    own: dict[str, Callable[..., Any]] = {
        "figure": words.figure,
        "signed": words.signed,
        "gap": words.gap,
        "count": lambda number: f"{number:,}",
        "percent": lambda share: f"{share:.1%}",
        "duration": words.duration,
        "size": words.size,
        "plain": words.plain,
    }
    environment.filters |= own | filters
    return environment.get_template(name)


def statements(findings: dict[str, Any]) -> dict[str, list[str]]:
    """Plain sentences: `result` says what came out, `protocol` how it was measured."""
    return {"result": _result_sentences(findings), "protocol": _protocol_sentences(findings)}


def _result_sentences(findings: dict[str, Any]) -> list[str]:
    names, model, label = findings["models"], findings["model"], findings["test_label"]
    sentences = []
    for gap in findings["differences"]:
        if gap["split"] != "test" or gap["model"] != "rellax":
            continue
        estimate = gap["auc"]
        outcome = {
            "ahead": f"{model} is ahead",
            "behind": f"{model} is behind",
            "not separated": "the two are not separated",
        }[words.verdict("auc", estimate)]
        sentences.append(
            f"AUC on the same rows, {model} minus {names[gap['minus']]}: {words.signed(estimate)}; "
            f"{outcome}."
        )
    zero, best = findings["training"]["zero_shot"], findings["training"]["best"]
    if zero is not None and best is not None:
        untrained = ", soft tokens untrained" if findings["recipe"]["model"]["spa"] else ""
        sentences.append(
            f"Zero-shot (step 0{untrained}) AUC on the valid rows is {words.plain(zero['auc'])}; "
            f"the adapter scored here, best on valid at step {best['step']:,}, has "
            f"{words.plain(best['auc'])} there."
        )
    if label != "test":
        sentences.append(
            "No valid row was scored, so nothing was selected apart from these rows and the "
            "figures are not called test figures."
        )
    return sentences


def _protocol_sentences(findings: dict[str, Any]) -> list[str]:
    recipe, crm, shots = findings["recipe"], findings["crm"], findings["shots"]
    rows = findings["rows"]["test"]
    data = recipe["data"]
    sentences = [
        f"The split is by time. {rows['n']:,} of the {rows['of']:,} {findings['test_label']} rows "
        f"were scored" + (", drawn with the recipe's seed." if rows["n"] < rows["of"] else ".")
    ]
    if data["freeze_history"]:
        sentences.append("Histories end at the last training event (frozen histories).")
    else:
        sentences.append(
            "Histories stream: a target's history holds all earlier events of its user, also those "
            "of the valid and test period. Models are not updated after training."
        )
    sentences.append(_crm_sentence(crm))
    sentences.append(_shots_sentence(shots, crm))
    if findings["selected_on_valid"]:
        sentences.append(
            "The epoch of the recommender and the adapter are chosen on the valid split; the test "
            "split is scored with the chosen model. Valid figures took part in the choice and "
            "flatter it."
        )
    scored = test_reads.sentence(findings["test_reads"]["all"], findings["test_reads"]["key"])
    if scored is not None:
        sentences.append(scored)
    if recipe["train"]["centre_logit"]:
        sentences.append(
            "One constant was subtracted from every logit of the LLM: set before training so that "
            "its mean on the valid rows fits the share of likes among the shots. It moves LogLoss, "
            "ACC and ECE, not AUC."
        )
    if recipe["model"]["backbone"] == DEQUANTISED:
        sentences.append(
            "The backbone is SmolLM2-135M-Instruct dequantised from a 4-bit file (Q4_1 GGUF), not "
            "the original bf16 weights."
        )
    if recipe["train"]["history_weight"] > 0:
        sentences.append(
            "Training also supervises the answers of the history's own questions (weight "
            f"{recipe['train']['history_weight']}); this is not part of the published method."
        )
    if crm["blend"] is not None:
        of_crm, of_llm, offset = crm["blend"]
        sentences.append(
            f"The score is {of_crm:.3f} times the CRM's logit, plus {of_llm:.3f} times the LLM's, "
            f"plus {offset:.3f}: three numbers fitted on the valid rows. This is not part of the "
            "published method."
        )
    if recipe["model"]["interaction_scope"] == "question":
        sentences.append(
            "M(h) acts on the target's question only; the history before it is read by plain LoRA. "
            "This is not part of the published method."
        )
    if recipe["model"]["instance_control"] != "none":
        sentences.append(
            "This is a control run: the instance embedding is "
            f"{recipe['model']['instance_control']}."
        )
    return sentences + _interval_sentences(findings)


def _interval_sentences(findings: dict[str, Any]) -> list[str]:
    sentences = [
        f"Intervals are 95 % percentile intervals over {findings['resamples']:,} bootstrap "
        "resamples of users; differences are paired on the same rows and resamples. One training "
        f"seed ({findings['recipe']['seed']}): the spread between seeds is not in them."
    ]
    few = [
        f"{facts['users']} {split}"
        for split, facts in findings["rows"].items()
        if facts["users"] < FEW_USERS
    ]
    if few:
        sentences.append(
            f"There are only {' and '.join(few)} users: with fewer than {FEW_USERS} a bootstrap "
            "by user tends to be too narrow, so the true doubt is larger than shown."
        )
    return sentences


def _crm_sentence(crm: dict[str, Any]) -> str:
    role = (
        "Its item embeddings or instance embedding feed the LLM, so the system as a whole is not "
        "few-shot, whatever the number of LLM shots."
        if crm["used_by_model"]
        else "This variant feeds nothing of it to the LLM."
    )
    if crm["held_out_rows"] == 0:
        text = (
            f"The CRM saw the full training set: it was trained on all {crm['rows']:,} training "
            f"rows. {role}"
        )
        unseen = crm["out_of_fold"]
        if unseen:
            cut = "users" if unseen["by"] == "user" else "blocks of time"
            text += (
                f" What it tells the LLM about a training row comes from one of "
                f"{len(unseen['folds'])} further recommenders, trained without the row's fold of "
                f"{cut}; their AUC on the rows they did not see is {words.plain(unseen['auc'])}."
            )
        return text
    return (
        f"The CRM was trained on the earliest {crm['rows']:,} of {crm['train_rows']:,} training "
        f"rows; the latest {crm['held_out_rows']:,} were held out from its weights (their labels "
        f"may still appear in the histories it reads). {role}"
    )


def _shots_sentence(shots: dict[str, Any], crm: dict[str, Any]) -> str:
    pool = {
        "all": "the whole training split",
        "holdout": "the rows held out from the CRM",
    }[shots["drawn_from"]]
    text = (
        f"The LLM was tuned on {shots['rows']:,} shots ({shots['share_of_train']:.2%} of the "
        f"training rows), drawn from {pool}"
    )
    if shots["prompts"] != shots["rows"]:
        text += f" and written as {shots['prompts']:,} prompts"
    unseen = shots["rows"] - shots["seen_by_crm"]
    if unseen == 0:
        return f"{text}; the CRM had been trained on every one of them."
    if shots["seen_by_crm"] == 0:
        return f"{text}; the CRM had been trained on none of them."
    return (
        f"{text}; the CRM had been trained on {shots['seen_by_crm']:,} of them, "
        f"{unseen:,} were new to it."
    )


def _draw(document: dict[str, Any]) -> dict[str, Markup]:
    """The charts by name; one without data is left out."""
    drawn = {"intervals": _intervals_chart(document), "calibration": _calibration_chart(document)}
    training = document["training"]
    if training["loss"]:
        steps = [line["step"] for line in training["loss"]]
        losses = [line["loss"] for line in training["loss"]]
        drawn["loss"] = charts.line_chart(
            "Training loss by step",
            "step",
            "loss",
            [charts.Line(f"mean of {_SMOOTH_STEPS} steps", steps, _smooth(losses))],
            faint=charts.Line("each step", steps, losses),
        )
    if training["valid"]:
        drawn["valid"] = charts.line_chart(
            "Valid AUC by step",
            "step",
            "valid AUC",
            [
                charts.Line(
                    document["model"],
                    [line["step"] for line in training["valid"]],
                    [line["auc"] for line in training["valid"]],
                    marks=True,
                )
            ],
            references=_valid_references(document),
        )
    if document["gates"]:
        drawn["gates"] = _gates_chart(document["gates"])
    if document["heterogeneity"]:
        drawn["heterogeneity"] = charts.line_chart(
            "Distinct genres in the history by K",
            "K, history items",
            "mean number of genres",
            [
                charts.Line(
                    name, [int(k) for k in _by_size(by_k)], [by_k[k] for k in _by_size(by_k)], True
                )
                for name, by_k in document["heterogeneity"].items()
            ],
        )
    return {name: Markup(svg) for name, svg in drawn.items()}


def _gates_chart(gates: list[dict[str, Any]]) -> str:
    """Departure from plain LoRA by depth, a line for each kind of layer."""
    kinds: dict[str, list[float]] = {}
    for gate in gates:
        kinds.setdefault(gate["layer"].rpartition(".")[2], []).append(gate["mean"])
    if len(kinds) > _MOST_LINES:
        deepest = max(map(len, kinds.values()))
        means = [[v[n] for v in kinds.values() if n < len(v)] for n in range(deepest)]
        kinds = {"mean of all kinds": [sum(values) / len(values) for values in means]}
    lines = [
        charts.Line(name, list(range(len(values))), values, marks=True)
        for name, values in kinds.items()
    ]
    return charts.line_chart(
        "Departure of M(h) from plain LoRA by layer", "layer", "|M - I|", lines
    )


def _intervals_chart(document: dict[str, Any]) -> str:
    rows = [
        (document["models"][r["model"]], r["auc"]["value"], r["auc"]["low"], r["auc"]["high"])
        for r in document["results"]
        if r["split"] == "test"
    ]
    return charts.interval_chart("AUC with 95 % interval by model", "AUC, 95 % interval", rows)


def _calibration_chart(document: dict[str, Any]) -> str:
    lines = [
        charts.Line(
            document["models"][curve["model"]], curve["mean_probability"], curve["share_positive"]
        )
        for curve in document["calibration"]
    ]
    return charts.reliability_chart("Calibration on the scored rows", lines)


def _valid_references(document: dict[str, Any]) -> dict[str, float]:
    valid_crm = (
        row["auc"]["value"]
        for row in document["results"]
        if row["split"] == "valid" and row["model"] == "crm"
    )
    return {"CRM, same rows": value for value in valid_crm}  # noqa: B035 - one or none


def _by_size(by_k: dict[str, float]) -> list[str]:
    return sorted(by_k, key=int)


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _smooth(values: list[float]) -> list[float]:
    """Mean of the last few values at each place."""
    windows = (values[max(0, n - _SMOOTH_STEPS + 1) : n + 1] for n in range(len(values)))
    return [sum(window) / len(window) for window in windows]

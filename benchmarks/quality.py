"""What ReLLaX gains over recommenders and over plain LoRA, from a study's stored predictions.

No model is run. With a study's folder the figures are computed from what `rellax study` has left
there; without one from the committed scores of `ml100k_quality`, after stages 1 to 3 have built the
tables and retrieved lists again (`--keep` writes that file from a folder).
Everything that is chosen is chosen on valid (mean AUC over seeds) among what has three seeds: K,
shots and recommender of ReLLaX, K of plain LoRA at the same shots, and the best recommender. The
interval of a difference resamples users, all seeds at once. The gate: the runs of a seed have the
same test rows, every score is finite and no planned seed of what is compared is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.artifacts import WorkDir
from rellax_ds.assets import fetch
from rellax_ds.errors import RellaxError
from rellax_ds.evaluation import study_archive, study_page, words
from rellax_ds.evaluation.study import find
from rellax_ds.evaluation.study_cells import Comparison, group
from rellax_ds.evaluation.study_runs import StudyRuns
from rellax_ds.partitions import disconnect
from rellax_ds.stages.pipeline import load_stage

if TYPE_CHECKING:
    from rellax_ds.evaluation.significance import Resampled

MINIMUM_SEEDS = 3
SCORES = Path(__file__).parent / "scores" / "ml100k_quality.zip"


def main() -> int:
    """Compute the figures; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("study", nargs="?", type=Path, help="folder; default: committed scores")
    arguments.add_argument("--scores", type=Path, default=SCORES, help="the committed scores")
    arguments.add_argument("--keep", action="store_true", help="write them from the folder")
    arguments.add_argument("--rellax", default="ml100k_stacked", help="method that is ReLLaX")
    arguments.add_argument("--lora", default="ml100k_lora_recent", help="method that is plain LoRA")
    options = arguments.parse_args()
    if options.keep and options.study is None:
        arguments.error("--keep writes scores from a study's folder; name the folder")
    report = Report("quality")
    try:
        if options.study is None:
            study = stored(options.scores)
        else:
            study = StudyRuns.read(options.study)
            if options.keep:
                study_archive.pack(options.study, options.scores)
        document = find(study)
        measure(report, study, document, options.rellax, options.lora)
        lines = study_page.statements(document)
        report.body.append("\n".join(f"- {line}" for line in lines))
    except RellaxError as error:
        report.check(False, str(error))
    return report.finish(options.report)


def stored(scores: Path) -> StudyRuns:
    """The study of committed scores, on tables that are built again, or skipped."""
    recipe = study_archive.plan_of(scores)[1][0].recipe
    fetch([recipe.data.dataset, recipe.embeddings.encoder])
    work = WorkDir(runtime.default_work_dir(f"{scores.stem}_rows"))
    for stage in ("tables", "embeddings", "retrieval"):
        load_stage(stage).run(recipe, work)
    disconnect()
    return study_archive.read(scores, work)


def measure(
    report: Report, study: StudyRuns, document: dict[str, Any], rellax: str, lora: str
) -> None:
    """Choose what is compared, check it, and write figures and tables into the report."""
    ours = best(report, document, rellax, None)
    plain = best(report, document, lora, None if ours is None else ours["shots"])
    if ours is None or plain is None:
        return
    crm = max(document["recommenders"], key=lambda row: row["valid_auc"])
    seeds = ours["seeds"]
    for row in (ours, plain, crm):
        missing = row.get("missing_seeds") or sorted(set(seeds) - set(row["seeds"]))
        report.check(not missing, f"{row['label']} lacks the seeds {missing}")
    report.check(len(seeds) >= MINIMUM_SEEDS, f"{len(seeds)} seeds, {MINIMUM_SEEDS} are needed")
    if report.failures:
        return
    compared = Comparison.of(study.scored)
    of_cell: dict[object, dict[int, Any]] = {
        cell_of(row): logits(study, row) for row in (ours, plain)
    }
    by_crm = group(study.scored, lambda one: one.crm)[crm["kind"], tuple(crm["axes"].items())]
    of_cell["crm"] = {seed: one.test.crm for seed, one in by_crm.items()}

    def mean(key: object) -> Resampled:
        return compared.mean(key, of_cell[key], seeds)

    for key, row in (
        ("rellax", cell_of(ours)),
        ("best_crm", "crm"),
        ("lora_recent", cell_of(plain)),
    ):
        found = mean(row).estimates()["auc"]
        if found is not None:
            report.figures[f"{key}_test_auc"] = found.value
    for key, other in (("crm", "crm"), ("lora", cell_of(plain))):
        gap = mean(cell_of(ours)).minus(mean(other)).estimates()["auc"]
        if gap is not None:
            report.figures[f"rellax_minus_{key}_low"] = gap.low
            report.figures[f"rellax_minus_{key}"] = gap.value
            report.figures[f"rellax_minus_{key}_high"] = gap.high
    report.table(
        ["chosen on valid", "K", "shots", "seeds", "valid AUC", "test AUC", "CRM saw"],
        [
            [
                *(row["label"], row.get("history_length", ""), row.get("shots", ""), len(seeds)),
                *(row["valid_auc"], words.interval(row["auc"]), study_page.crm_saw(row)),
            ]
            for row in (ours, plain, crm)
        ],
    )
    report.body.append(study_page.table(document))
    for table, note in (
        (study_page.contrast_table(document), study_page.CONTRAST_NOTE),
        (study_page.blend_table(document), study_page.BLEND_NOTE),
        (study_page.label_table(document), study_page.LABELS_NOTE),
        (study_page.group_table(document), study_page.GROUP_NOTE),
    ):
        if table:
            report.body.append(f"{table}\n\n{note}")


def best(
    report: Report, document: dict[str, Any], method: str, shots: int | None
) -> dict[str, Any] | None:
    """The cell of a method with the best mean valid AUC, at given shots if they are given.

    Cells that are planned for fewer than `MINIMUM_SEEDS` seeds are no candidates.
    """
    rows = [
        row
        for row in document["results"]
        if row["method"] == method and shots in (None, row["shots"])
    ]
    at = "" if shots is None else f" at {shots} shots"
    report.check(bool(rows), f"the study has no finished run of {method}{at}")
    planned = [row for row in rows if len(row["seeds"] + row["missing_seeds"]) >= MINIMUM_SEEDS]
    return max(planned or rows, key=lambda row: row["valid_auc"], default=None)


def cell_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The cell a row of the findings is about."""
    return row["method"], row["history_length"], row["shots"], tuple(row["axes"].items())


def logits(study: StudyRuns, row: dict[str, Any]) -> dict[int, Any]:
    """Test logits of a cell's runs by seed."""
    return {one.seed: one.test.logit for one in study.scored if one.run.cell == cell_of(row)}


if __name__ == "__main__":
    raise SystemExit(main())

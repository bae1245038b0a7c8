"""What the finished runs of a study have left: scores, the recommender's logits, costs.

Only committed artefacts are read, so whatever is computed from here can be computed again without
running anything. Runs of one seed must have scored the same rows; that is checked, not assumed,
because every comparison rests on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from rellax_ds import metrics
from rellax_ds.errors import ArtifactError, TableError
from rellax_ds.evaluation import test_reads
from rellax_ds.evaluation.findings import reads_recommender
from rellax_ds.schema import PREDICTIONS, SPLITS, check_table
from rellax_ds.study import read_plan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.artifacts import WorkDir
    from rellax_ds.study import Run

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

_TRAIN, _VALID, _TEST = range(3)


@dataclass(frozen=True)
class Rows:
    """Scored rows of one split, by increasing sample.

    Attributes:
        sample: Sample ids, [N].
        user: User of each, [N].
        label: Label of each, [N].
        logit: The run's logits, [N].
        crm: The logits of the run's own recommender, [N].
        history: Events in the user's history before the target, [N].
    """

    sample: IntArray
    user: IntArray
    label: IntArray
    logit: FloatArray
    crm: FloatArray
    history: IntArray

    def where(self, chosen: NDArray[np.bool_]) -> Rows:
        """Some of the rows, by a mask [N]."""
        return Rows(*(getattr(self, part.name)[chosen] for part in fields(self)))


@dataclass(frozen=True)
class Scored:
    """One finished run.

    Attributes:
        run: Which it is.
        work: Its work folder.
        test: Its test rows.
        valid: Its valid rows.
        crm_valid_auc: AUC of its recommender on the whole valid split.
        crm_rows: Training rows of its recommender's weights.
        train_rows: All training rows.
        reads_crm: Whether the LLM was fed anything of the recommender.
        heterogeneity: Mean distinct genres by history and K.
        counts: What the training counted.
        seconds: What training and scoring took; the only part that differs between reruns.
        versions: Of Python and libraries that scored it.
        commit: Commit that scored it.
        key: Key of the scoring.
    """

    run: Run
    work: WorkDir
    test: Rows
    valid: Rows
    crm_valid_auc: float
    crm_rows: int
    train_rows: int
    reads_crm: bool
    heterogeneity: dict[str, dict[str, float]]
    counts: dict[str, Any]
    seconds: dict[str, float]
    versions: dict[str, str]
    commit: str | None
    key: str

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.recipe.seed

    @property
    def crm(self) -> tuple[str, tuple[tuple[str, Any], ...]]:
        """Kind of its recommender, and what varies of it beside the kind."""
        varied = [
            (key, value)
            for key, value in self.run.varied
            if key.startswith(("crm.", "data.")) and key != "crm.kind"
        ]
        return self.run.recipe.crm.kind, tuple(varied)


@dataclass(frozen=True)
class StudyRuns:
    """A study's plan and its finished runs, in the plan's order, and every scoring of test rows in
    its folder, also of models that are no longer part of it (`test_reads.read`).
    """

    plan: dict[str, Any]
    runs: list[Run]
    scored: list[Scored]
    reads: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> StudyRuns:
        """Read a study's folder.

        Raises:
            ArtifactError: There is no plan, no finished run, or an artefact cannot be read.
            TableError: Two runs of one seed have scored other rows, or a score is not finite.
        """
        plan, runs = read_plan(root)
        finished = set(plan["finished"])
        scored = [_read(run, run.work(root)) for run in runs if run.name in finished]
        if not scored:
            raise ArtifactError(f"{root}: no run of this study is finished; run `rellax study`")
        _check_same_rows(scored)
        reads = [line for place in sorted(root.glob("stages/*")) for line in test_reads.read(place)]
        return cls(plan, runs, scored, reads)

    @property
    def missing(self) -> list[str]:
        """Names of the runs that are not finished."""
        done = {one.run.name for one in self.scored}
        return [run.name for run in self.runs if run.name not in done]


def _read(run: Run, work: WorkDir) -> Scored:
    path = work.stage_dir("predict") / "predictions.parquet"
    work.check("predict")
    table = check_table(pq.read_table(path), PREDICTIONS, str(path)).sort_by("sample")
    columns = {name: table[name].to_numpy() for name in PREDICTIONS}
    bad = ~np.isfinite(columns["logit"])
    if bad.any():
        raise TableError(f"{path}: the logit of sample {columns['sample'][bad][0]} is not finite")
    crm = work.stage_dir("crm")
    crm_logits = np.load(crm / "logits.npy", allow_pickle=False).astype(np.float64)
    samples = pq.read_table(
        work.stage_dir("tables") / "samples.parquet",
        columns=["label", "split", "history_start", "history_end"],
    )
    history = samples["history_end"].to_numpy() - samples["history_start"].to_numpy()
    split, label = samples["split"].to_numpy(), samples["label"].to_numpy()
    if crm_logits.size != split.size:
        raise ArtifactError(
            f"{crm / 'logits.npy'}: {crm_logits.size} rows for {split.size} samples; run the study"
        )
    train, predict = work.require("train"), work.require("predict")
    held_out = json.loads((crm / "metrics.json").read_text(encoding="utf-8"))["holdout_start"]
    of_train = np.flatnonzero(split == _TRAIN)
    heterogeneity = work.stage_dir("retrieval") / "heterogeneity.json"
    return Scored(
        run=run,
        work=work,
        test=_rows(columns, crm_logits, history, _TEST),
        valid=_rows(columns, crm_logits, history, _VALID),
        crm_valid_auc=metrics.auc(label[split == _VALID], crm_logits[split == _VALID]),
        crm_rows=int(of_train.size if held_out is None else (of_train < held_out).sum()),
        train_rows=int(of_train.size),
        reads_crm=reads_recommender(run.recipe),
        heterogeneity=json.loads(heterogeneity.read_text(encoding="utf-8")),
        counts=train.counts,
        seconds=_seconds(work, train.seconds, predict.seconds, table.num_rows),
        versions=predict.versions,
        commit=predict.commit,
        key=predict.key,
    )


def _rows(columns: dict[str, Any], crm_logits: FloatArray, history: IntArray, split: int) -> Rows:
    chosen = columns["split"] == split
    sample = columns["sample"][chosen].astype(np.int64)
    return Rows(
        sample,
        columns["user"][chosen].astype(np.int64),
        columns["label"][chosen].astype(np.int64),
        columns["logit"][chosen].astype(np.float64),
        crm_logits[sample],
        history[sample].astype(np.int64),
    )


def _seconds(work: WorkDir, train: float, predict: float, scored: int) -> dict[str, float]:
    """Time of the stages from their manifests, of the steps alone from the training's log."""
    log = work.stage_dir("train") / "log.jsonl"
    batch = work.require("train").recipe["train"]["global_batch"]
    steps = {
        line["step"]: batch / line["samples_per_second"]
        for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())
        if line["event"] == "step"
    }
    return {
        "train": train,
        "steps": round(sum(steps.values()), 3),
        "predict": predict,
        "predict_per_row": round(predict / max(scored, 1), 6),
    }


def _check_same_rows(scored: list[Scored]) -> None:
    first: dict[int, Scored] = {}
    for one in scored:
        other = first.setdefault(one.seed, one)
        for split, ours, theirs in (
            (SPLITS[_TEST], one.test, other.test),
            (SPLITS[_VALID], one.valid, other.valid),
        ):
            same = np.array_equal(ours.sample, theirs.sample)
            if not same or not np.array_equal(ours.label, theirs.label):
                raise TableError(
                    f"study: {one.run.name} and {other.run.name} have one seed and other {split} "
                    f"rows; a study compares on the same rows, keep data and shards.{split}_rows"
                )

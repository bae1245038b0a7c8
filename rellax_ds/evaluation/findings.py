"""Every number of the report, computed from the committed artefacts: the content of report.json.

All models are compared on the rows ReLLaX scored, with the same resamples of users, and the models
that cost nothing to score are also given on the whole test split, labelled so. Whoever is ahead is
listed the same way. What a reader must know to judge a figure (which rows the recommender saw, how
selection was done, how histories run) is computed from the artefacts too, not assumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from rellax_ds import metrics
from rellax_ds.artifacts import STAGES
from rellax_ds.config import CRM_NAMES
from rellax_ds.errors import ArtifactError
from rellax_ds.evaluation import test_reads
from rellax_ds.evaluation.baselines import FEATURES, Log, LogisticBaseline, last_labels
from rellax_ds.evaluation.gates import gate_norms
from rellax_ds.evaluation.groups import groups_of
from rellax_ds.evaluation.significance import Estimate, UserBootstrap
from rellax_ds.family import METHODS
from rellax_ds.redaction import redact, redacted
from rellax_ds.schema import PREDICTIONS, check_table
from rellax_ds.shards.read import ShardIndex

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.artifacts import Manifest, WorkDir
    from rellax_ds.config import Recipe

    FloatArray = NDArray[np.float64]
    IntArray = NDArray[np.int64]

INPUTS = STAGES[:-1]
"""Stages whose artefacts the report reads: all that come before it."""

_TRAIN, _VALID, _TEST = range(3)
_MIN_GROUP_USERS = 5
_EXAMPLES = 4
_VALID_FIGURES = ("auc", "log_loss", "accuracy")
_PAIRS = (
    ("rellax", "crm"),
    ("rellax", "logistic"),
    ("rellax", "last_labels"),
    ("ensemble", "crm"),
    ("ensemble", "rellax"),
)


@dataclass(frozen=True)
class Evidence:
    """The artefacts a report is made from, loaded.

    Attributes:
        recipe: The run's recipe.
        log: Events and samples.
        user: User of each sample, [S].
        scored: Sample ids that ReLLaX scored, increasing, [N].
        logits: ReLLaX's logits of those, [N].
        crm_logits: The recommender's logit of every sample, [S].
        crm: The recommender's metrics.json.
        heterogeneity: Mean distinct genres by history and K.
        shots: Sample ids of the training prompts, one a prompt.
        training: The lines of the training log.
        manifests: By stage.
        blend: Weights of the recommender's and the LLM's logit, and the constant, or None.
        gates: How far every layer's M(h) is from plain LoRA; empty without gates.
        prompts: The lines of the watched valid prompts.
        test_reads: When test rows were scored in this folder, `test_reads.read`.
    """

    recipe: Recipe
    log: Log
    user: IntArray
    scored: IntArray
    logits: FloatArray
    crm_logits: FloatArray
    crm: dict[str, Any]
    heterogeneity: dict[str, dict[str, float]]
    shots: IntArray
    training: list[dict[str, Any]]
    manifests: dict[str, Manifest]
    blend: list[float] | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[dict[str, Any]] = field(default_factory=list)
    test_reads: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, recipe: Recipe, work: WorkDir) -> Evidence:
        """Load the artefacts of a run.

        Raises:
            ArtifactError: A stage has not been committed, or its rows do not fit the tables.
            TableError: A table does not have the promised columns.
        """
        manifests = {stage: work.require(stage) for stage in INPUTS}
        tables, crm = work.stage_dir("tables"), work.stage_dir("crm")
        path = work.stage_dir("predict") / "predictions.parquet"
        predictions = check_table(pq.read_table(path), PREDICTIONS, str(path))
        crm_logits = np.load(crm / "logits.npy", allow_pickle=False).astype(np.float64)
        samples = pq.read_table(tables / "samples.parquet", columns=["user"])
        if crm_logits.size != samples.num_rows:
            raise ArtifactError(
                f"{crm / 'logits.npy'}: {crm_logits.size} rows for {samples.num_rows} samples; "
                "run `rellax crm` again"
            )
        order = np.argsort(predictions["sample"].to_numpy())
        return cls(
            recipe=recipe,
            log=Log.read(tables),
            user=samples["user"].to_numpy().astype(np.int64),
            scored=predictions["sample"].to_numpy()[order].astype(np.int64),
            logits=predictions["logit"].to_numpy()[order].astype(np.float64),
            crm_logits=crm_logits,
            crm=_read_json(crm / "metrics.json"),
            heterogeneity=_read_json(work.stage_dir("retrieval") / "heterogeneity.json"),
            shots=_training_prompts(work.stage_dir("shards")),
            training=_read_lines(work.stage_dir("train") / "log.jsonl"),
            manifests=manifests,
            blend=_read_json(work.stage_dir("train") / "adapter" / "rellax.json").get("blend"),
            gates=gate_norms(work.stage_dir("train") / "adapter", work.stage_dir("shards")),
            prompts=_read_lines(work.stage_dir("train") / "scored.jsonl"),
            test_reads=test_reads.read(work.root),
        )

    def rows_of(self, split: int) -> IntArray:
        """Scored sample ids of a split."""
        rows: IntArray = self.scored[self.log.split[self.scored] == split]
        return rows

    @property
    def model_name(self) -> str:
        """What the recipe's model is called; an ablation is not called ReLLaX."""
        parts = ["SPA"] * self.recipe.model.spa
        parts += [METHODS[self.recipe.model.interaction]]
        name = "ReLLaX" if parts == ["SPA", "CFLoRA"] else " + ".join(parts)
        if self.recipe.train.epochs > 0:
            return name
        return "zero-shot LLM" if parts == ["LoRA"] else f"untrained {name}"


def find(evidence: Evidence) -> dict[str, Any]:
    """All figures of a report as one JSON-like document.

    Raises:
        ArtifactError: The predictions hold no test row.
        TableError: A scored split has one class or one user, or a logit is not finite.
    """
    recipe = evidence.recipe
    valid, test = evidence.rows_of(_VALID), evidence.rows_of(_TEST)
    if not test.size:
        raise ArtifactError("predictions.parquet: no test row; run `rellax predict` again")
    logistic = LogisticBaseline.fit(evidence.log)
    names = _model_names(evidence)
    splits = {"test": test, "valid": valid} if valid.size else {"test": test}
    results, differences = [], []
    for split, ids in splits.items():
        found, gaps = _compare(evidence, _all_logits(evidence, logistic, ids), ids, split)
        results += found
        differences += gaps
    return {
        "name": recipe.name,
        "description": redact(recipe.description),
        "model": evidence.model_name,
        "selected_on_valid": bool(valid.size),
        "test_label": "test" if valid.size else "held-out",
        "test_reads": {"all": evidence.test_reads, "key": evidence.manifests["predict"].key},
        "rows": {split: _describe_rows(evidence, ids) for split, ids in splits.items()},
        "models": names,
        "results": results,
        "differences": differences,
        "full_split": _full_split(evidence, logistic),
        "gates": evidence.gates,
        "examples": _examples(evidence),
        "groups": _groups(evidence, logistic),
        "calibration": _calibration(evidence),
        "training": _training_curves(evidence),
        "shots": _shot_facts(evidence),
        "crm": _crm_facts(evidence),
        "logistic": {
            "weights": dict(zip(FEATURES, (float(w) for w in logistic.weights), strict=True)),
            "rows": logistic.num_rows,
        },
        "heterogeneity": evidence.heterogeneity,
        "stages": [_stage_facts(manifest) for manifest in evidence.manifests.values()],
        "resamples": recipe.predict.bootstrap,
        "recipe": redacted(recipe.model_dump(mode="json")),
        "recipe_digest": recipe.digest,
        "versions": evidence.manifests["predict"].versions,
    }


def _model_names(evidence: Evidence) -> dict[str, str]:
    return {
        "rellax": evidence.model_name,
        "ensemble": f"{evidence.model_name} and CRM, mean logit",
        "crm": f"CRM alone ({CRM_NAMES[evidence.recipe.crm.kind]})",
        "logistic": "logistic on item and user means",
        "last_labels": "mean of the last 10 labels",
    }


def _cheap_logits(
    evidence: Evidence, logistic: LogisticBaseline, ids: IntArray
) -> dict[str, FloatArray]:
    """Logits of the models that can score any sample."""
    return {
        "crm": evidence.crm_logits[ids],
        "logistic": logistic.logits(ids),
        "last_labels": last_labels(evidence.log, ids),
    }


def _all_logits(
    evidence: Evidence, logistic: LogisticBaseline, ids: IntArray
) -> dict[str, FloatArray]:
    """Logits of every model on scored samples, in the order of `_model_names`."""
    ours = evidence.logits[np.searchsorted(evidence.scored, ids)]
    ensemble = (ours + evidence.crm_logits[ids]) / 2
    return {"rellax": ours, "ensemble": ensemble, **_cheap_logits(evidence, logistic, ids)}


def _bootstrap(evidence: Evidence, ids: IntArray) -> UserBootstrap:
    recipe = evidence.recipe
    return UserBootstrap(evidence.user[ids], recipe.predict.bootstrap, recipe.seed)


def as_json(estimates: dict[str, Estimate | None]) -> dict[str, dict[str, float | int] | None]:
    """Estimates by metric, for JSON; None where a metric is not defined."""
    return {name: found.as_dict() if found else None for name, found in estimates.items()}


def _compare(
    evidence: Evidence, logits: dict[str, FloatArray], ids: IntArray, split: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every model on the same rows, and the paired differences that answer a question."""
    bootstrap = _bootstrap(evidence, ids)
    labels = evidence.log.label[ids]
    size = {"split": split, "n": int(ids.size), "users": bootstrap.num_users}
    resampled = {key: bootstrap.resample(labels, scores) for key, scores in logits.items()}
    results = [
        {
            "model": key,
            **size,
            **as_json(found.estimates()),
            "ece": metrics.ece(labels, logits[key]),
        }
        for key, found in resampled.items()
    ]
    differences = [
        {
            "model": first,
            "minus": second,
            **size,
            **as_json(resampled[first].minus(resampled[second]).estimates()),
        }
        for first, second in _PAIRS
    ]
    return results, differences


def _describe_rows(evidence: Evidence, ids: IntArray) -> dict[str, Any]:
    log = evidence.log
    history = log.history_end[ids] - log.history_start[ids]
    return {
        "n": int(ids.size),
        "of": int((log.split == log.split[ids[0]]).sum()),
        "users": int(np.unique(evidence.user[ids]).size),
        "positives": int(log.label[ids].sum()),
        "base_rate": float(log.label[ids].mean()),
        "median_history": float(np.median(history)),
    }


def _full_split(evidence: Evidence, logistic: LogisticBaseline) -> list[dict[str, Any]]:
    """The models that can score any sample, on every row of the test split."""
    ids = np.flatnonzero(evidence.log.split == _TEST)
    bootstrap = _bootstrap(evidence, ids)
    labels = evidence.log.label[ids]
    return [
        {
            "model": key,
            "split": "test",
            "n": int(ids.size),
            "users": bootstrap.num_users,
            **as_json(bootstrap.resample(labels, logits).estimates()),
            "ece": metrics.ece(labels, logits),
        }
        for key, logits in _cheap_logits(evidence, logistic, ids).items()
    ]


def _groups(evidence: Evidence, logistic: LogisticBaseline) -> list[dict[str, Any]]:
    """AUC of every model on groups of the scored test rows; empty where a group is too small."""
    found = []
    for by, name, ids in groups_of(evidence.log, evidence.user, evidence.rows_of(_TEST)):
        labels = evidence.log.label[ids]
        users = int(np.unique(evidence.user[ids]).size)
        scores: dict[str, Any] = {}
        if users >= _MIN_GROUP_USERS and 0 < labels.sum() < ids.size:
            bootstrap = _bootstrap(evidence, ids)
            for key, logits in _all_logits(evidence, logistic, ids).items():
                scores[key] = as_json(bootstrap.resample(labels, logits).estimates())["auc"]
        found.append({"by": by, "group": name, "n": int(ids.size), "users": users, "auc": scores})
    return found


def _calibration(evidence: Evidence) -> list[dict[str, Any]]:
    """Reliability of ReLLaX and of the recommender on the scored test rows."""
    ids = evidence.rows_of(_TEST)
    ours = evidence.logits[np.searchsorted(evidence.scored, ids)]
    found = []
    for key, logits in (("rellax", ours), ("crm", evidence.crm_logits[ids])):
        bins = metrics.reliability(evidence.log.label[ids], logits)
        found.append({"model": key, **{k: v.tolist() for k, v in bins._asdict().items()}})
    return found


def _training_curves(evidence: Evidence) -> dict[str, Any]:
    """Loss by step and valid figures by step; those of step 0 are zero-shot.

    A step whose loss was not finite was skipped in training and is left out of the curve.
    """
    steps, scores = {}, {}
    for line in evidence.training:
        if line["event"] == "step" and line["loss"] is not None:
            steps[int(line["step"])] = float(line["loss"])
        elif line["event"] == "valid":
            scores[int(line["step"])] = line
    valid = [
        {"step": step, **{name: line[name] for name in _VALID_FIGURES}}
        for step, line in sorted(scores.items())
    ]
    trained = [line for line in valid if line["step"] > 0]
    return {
        "loss": [{"step": step, "loss": loss} for step, loss in sorted(steps.items())],
        "valid": valid,
        "zero_shot": next((line for line in valid if line["step"] == 0), None),
        "best": max(trained, key=lambda line: line["auc"], default=None),
    }


def _examples(evidence: Evidence) -> list[dict[str, Any]]:
    """A few watched valid prompts with the probability of a like before and after training: the
    surest hits and misses, and those in doubt.
    """
    texts = {line["sample"]: line for line in evidence.prompts if line["event"] == "prompt"}
    curves: dict[int, list[tuple[int, float]]] = {}
    for line in evidence.prompts:
        if line["event"] != "prompt":
            curves.setdefault(line["sample"], []).append((line["step"], line["probability"]))
    best = _training_curves(evidence)["best"]
    if best is None:
        return []
    found = []
    for sample, curve in curves.items():
        by_step = dict(curve)
        if sample in texts and best["step"] in by_step:
            text, label = texts[sample]["prompt"], texts[sample]["label"]
            chance = by_step[best["step"]]
            found.append(
                {
                    "sample": sample,
                    "prompt": redact(text),
                    "label": label,
                    "before": by_step.get(0),
                    "after": chance,
                    "error": abs(label - chance),
                }
            )
    found.sort(key=lambda example: (example["error"], example["sample"]))
    places = np.linspace(0, len(found) - 1, min(_EXAMPLES, len(found))).round().astype(int)
    return [found[place] for place in places.tolist()]


def _shot_facts(evidence: Evidence) -> dict[str, Any]:
    """How many training rows the LLM saw, and how many of those the recommender had seen."""
    shots = np.unique(evidence.shots)
    num_train = int((evidence.log.split == _TRAIN).sum())
    start = evidence.crm.get("holdout_start")
    seen = int(shots.size if start is None else (shots < start).sum())
    if evidence.crm.get("out_of_fold"):
        seen = 0  # shots are drawn from rows with a fold only
    return {
        "prompts": int(evidence.shots.size),
        "rows": int(shots.size),
        "share_of_train": shots.size / num_train,
        "seen_by_crm": seen,
        "drawn_from": evidence.recipe.shards.train_from,
    }


def _crm_facts(evidence: Evidence) -> dict[str, Any]:
    train = np.flatnonzero(evidence.log.split == _TRAIN)
    start = evidence.crm.get("holdout_start")
    rows = int(train.size if start is None else (train < start).sum())
    return {
        "kind": evidence.recipe.crm.kind,
        "train_rows": int(train.size),
        "rows": rows,
        "held_out_rows": int(train.size) - rows,
        "out_of_fold": evidence.crm.get("out_of_fold"),
        "blend": evidence.blend,
        "used_by_model": reads_recommender(evidence.recipe),
    }


def reads_recommender(recipe: Recipe) -> bool:
    """Whether the score rests on anything of the recommender: item embeddings, h, or its logit."""
    model = recipe.model
    return model.spa or model.residual != "none" or not model.spec.input_independent


def _stage_facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "stage": manifest.stage,
        "seconds": manifest.seconds,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "bytes": sum(int(facts["bytes"]) for facts in manifest.files.values()),
        "counts": manifest.counts,
        "content": manifest.content,
        "commit": manifest.commit,
    }


def _training_prompts(folder: Path) -> IntArray:
    """Sample id of every training prompt, read from the checked index."""
    samples: IntArray = ShardIndex.open(folder).rows("train").column("sample").to_numpy()
    return samples


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}; run the stage that writes it again") from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: not a JSON object; run the stage that writes it again")
    return document


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}; run `rellax train` again") from None

"""Every kind of recommender on MovieLens-100K: AUC and LogLoss on all valid and test rows.

One recipe's split and settings, one training loop of a few epochs, of which the best on valid is
kept; test rows are scored once. Only what a kind is about differs: `sim` reads SUBR's histories,
`sim_full` searches a history of 100 behaviours. The gate: every kind ranks all test rows better
than chance, with its whole interval, and a second training of the first kind gives the same logits.
Figures end the output, one a line: FIGURE name value.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.report import Report, parser
from rellax_ds import metrics, runtime
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import CRMConfig, load_recipe
from rellax_ds.crm.features import Interactions, build_history
from rellax_ds.crm.fit import fit, score
from rellax_ds.crm.kinds import KINDS
from rellax_ds.evaluation.significance import UserBootstrap
from rellax_ds.partitions import disconnect
from rellax_ds.stages.pipeline import load_stage
from rellax_ds.tables import read_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rellax_ds.config import Recipe
    from rellax_ds.evaluation.significance import Estimate, Resampled

LONG = {"kind": "sim_full", "history_length": 100, "search_length": 30}
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "sim_full": LONG,
    "sim_full_soft": {**LONG, "search": "soft"},
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        valid: AUC and LogLoss on valid.
        logits: Of the test rows, in order.
        seconds: Of training, with the valid scores between epochs.
        parameters: Trained numbers.
        epochs: Epochs run; the best one is kept.
    """

    valid: tuple[float, float]
    logits: NDArray[np.float32]
    seconds: float
    parameters: int
    epochs: int


@dataclass(frozen=True)
class Job:
    """What a process needs for one training.

    Attributes:
        tables: Stage 1's folder.
        retrieval: Stage 3's folder, for `sim`.
        config: Of the recommender.
        seed: Of the training.
    """

    tables: Path
    retrieval: Path
    config: CRMConfig
    seed: int


def prepare(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """The folders of stages 1 and 3."""
    work = WorkDir(folder)
    for stage in ("tables", "embeddings", "retrieval"):
        load_stage(stage).run(recipe, work)
    disconnect()
    return work.stage_dir("tables"), work.stage_dir("retrieval")


def train(job: Job) -> Run:
    """Train one recommender on one thread and score valid and test."""
    runtime.prepare()
    torch.set_num_threads(1)
    log, config = Interactions.of(read_tables(job.tables)), job.config
    history = build_history(log, config, job.retrieval)
    start = time.monotonic()
    fitted = fit(log, history, config, job.seed)
    seconds = time.monotonic() - start

    def logits(split: str) -> NDArray[np.float32]:
        rows = log.split_rows(split)
        return np.concatenate([part for _, part, _ in score(fitted.model, fitted.features, rows)])

    labels, valid = log.label[log.split_rows("valid")], logits("valid")
    return Run(
        valid=(metrics.auc(labels, valid), metrics.log_loss(labels, valid)),
        logits=logits("test"),
        seconds=seconds,
        parameters=sum(p.numel() for p in fitted.model.parameters()),
        epochs=len(fitted.epochs),
    )


def train_all(
    recipe: Recipe, folders: tuple[Path, Path], seeds: Sequence[int]
) -> tuple[dict[str, list[Run]], Run]:
    """Every kind with every seed, one process a core, and the first of them once more."""
    configs = {
        name: CRMConfig(**{**recipe.crm.model_dump(), **changes})
        for name, changes in VARIANTS.items()
    }
    jobs = [Job(*folders, config, seed) for config in configs.values() for seed in seeds]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(runtime.num_cpus(), mp_context=context) as pool:
        *found, again = pool.map(train, [*jobs, jobs[0]])
    each = len(seeds)
    return {name: found[n * each : (n + 1) * each] for n, name in enumerate(configs)}, again


def shown(estimate: Estimate | None, sign: str = "") -> str:
    """A figure with its interval."""
    assert estimate is not None
    return f"{estimate.value:{sign}.4f} ({estimate.low:{sign}.4f} to {estimate.high:{sign}.4f})"


def row(name: str, seed: int, run: Run, found: Resampled, base: Resampled) -> list[object]:
    """One line of the table."""
    estimates, ahead = found.estimates(), found.minus(base).estimates()
    return [
        name,
        seed,
        f"{run.valid[0]:.4f}",
        f"{run.valid[1]:.4f}",
        shown(estimates["auc"]),
        shown(estimates["log_loss"]),
        shown(ahead["auc"], "+"),
        f"{run.seconds:.1f}",
        run.epochs,
        run.parameters,
    ]


def main() -> int:
    """Train every kind, check and print."""
    flags = parser(__doc__)
    flags.add_argument("--recipe", default="ml100k_demo")
    flags.add_argument("--seeds", type=int, default=1)
    flags.add_argument("--max-epochs", type=int, default=3, help="keeps it within ten minutes")
    flags.add_argument("--resamples", type=int, default=1000)
    flags.add_argument("--set", action="append", default=[], help="change one field of the recipe")
    options = flags.parse_args()
    runtime.prepare()
    recipe = load_recipe(options.recipe, [f"crm.max_epochs={options.max_epochs}", *options.set])
    page = Report("recommenders")
    with tempfile.TemporaryDirectory(prefix="rellax-recommenders-") as name:
        folders = prepare(recipe, Path(name))
        log = Interactions.of(read_tables(folders[0]))
        runs, again = train_all(recipe, folders, range(recipe.seed, recipe.seed + options.seeds))
    first = next(iter(VARIANTS))
    page.check(np.array_equal(again.logits, runs[first][0].logits), f"{first} does not repeat")
    report(page, log, runs, options.resamples, recipe)
    return page.finish(options.report)


def report(
    page: Report, log: Interactions, runs: dict[str, list[Run]], resamples: int, recipe: Recipe
) -> None:
    """Fill the page: a row for each training, and the gate on each test AUC."""
    test = log.split_rows("test")
    labels = log.label[test]
    bootstrap = UserBootstrap(log.sample_user[test], resamples, recipe.seed)
    found = {
        n: [bootstrap.resample(labels, run.logits) for run in each] for n, each in runs.items()
    }
    rows = []
    for name, each in runs.items():
        for n, run in enumerate(each):
            rows.append(row(name, recipe.seed + n, run, found[name][n], found["din"][n]))
            low = found[name][n].estimates()["auc"]
            page.check(low is not None and low.low > 0.5, f"{name} ranks no better than chance")
    valid = {name: float(np.mean([run.valid[0] for run in each])) for name, each in runs.items()}
    aucs = {n: float(np.mean([r.values["auc"] for r in each])) for n, each in found.items()}
    best = max(valid, key=lambda name: valid[name])
    page.body.append(
        f"Recipe `{recipe.name}`: {len(log.split_rows('train'))} training rows, "
        f"{len(log.split_rows('valid'))} valid, all {len(test)} test rows of "
        f"{bootstrap.num_users} users; intervals are 95 % by bootstrap over users, {resamples} "
        f"resamples. At most {recipe.crm.max_epochs} epochs, patience {recipe.crm.patience}, "
        f"one thread each, {runtime.num_cpus()} trainings at a time. Best on valid: {best}."
    )
    page.table(
        (
            "kind",
            "seed",
            "valid AUC",
            "valid LogLoss",
            "test AUC",
            "test LogLoss",
            "test AUC beyond DIN's, paired",
            "seconds",
            "epochs",
            "parameters",
        ),
        rows,
    )
    page.figures = {
        **{f"crm_auc_{name}": value for name, value in aucs.items()},
        "best_crm_test_auc": aucs[best],
        "crm_seconds": sum(run.seconds for each in runs.values() for run in each),
    }


if __name__ == "__main__":
    sys.exit(main())

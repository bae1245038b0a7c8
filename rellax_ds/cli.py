"""The `rellax` command: one subcommand per stage, the whole pipeline, the plan of a training, and
the fetching of assets.

Every stage takes the same four flags; `rellax shards verify` checks what stage 5 wrote. An
error a user can mend is one line on standard error and exit status 1; anything else is a defect of
ours and keeps its traceback.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rellax_ds import runtime
from rellax_ds.artifacts import STAGES, WorkDir
from rellax_ds.config import load_recipe
from rellax_ds.errors import ConfigError, RellaxError
from rellax_ds.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.config import Recipe
    from rellax_ds.study import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune LLMs for recommendation over lifelong behaviour.",
)

RecipeFlag = Annotated[
    str, typer.Option("--recipe", help="Shipped recipe by name, or the path of a YAML file.")
]
SetFlag = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one key: section.key=value; may be repeated."),
]
WorkDirFlag = Annotated[
    Path | None,
    typer.Option("--work-dir", help="Folder of the run's artefacts; by default work/RECIPE."),
]
ResumeFlag = Annotated[
    str,
    typer.Option("--resume", help="Continue an interrupted training: auto, never or a checkpoint."),
]
RanksFlag = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Ranks to plan for; by default train.num_processes."),
]
HostsFlag = Annotated[
    int, typer.Option("--hosts", min=1, help="Machines the ranks are spread over.")
]
GpuMemoryFlag = Annotated[
    float | None,
    typer.Option("--gpu-memory", min=0.1, help="GiB of one GPU; refuse what does not fit."),
]
ThroughputFlag = Annotated[
    float | None,
    typer.Option(
        "--tokens-per-second", min=1e-3, help="Measured throughput of all ranks, for the hours."
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")]
UntilFlag = Annotated[str, typer.Option("--until", help=f"Last stage to run: {', '.join(STAGES)}.")]


StudyFlag = Annotated[
    str, typer.Option("--study", help="Shipped study by name, or the path of a YAML file.")
]
OnlyFlag = Annotated[
    str | None, typer.Option("--only", help="Run this one run of the study, in this process.")
]
ParallelFlag = Annotated[
    int | None,
    typer.Option(
        "--parallel", min=1, help="Runs at a time; by default one, with --ray as many as fit."
    ),
]
RayFlag = Annotated[
    bool,
    typer.Option("--ray", help="Run them on the Ray cluster of RAY_ADDRESS or the submitted job."),
]
ReportOnlyFlag = Annotated[
    bool, typer.Option("--report-only", help="Run nothing; report on the runs that are finished.")
]


def _open_run(
    recipe: str, overrides: list[str] | None, work_dir: Path | None
) -> tuple[Recipe, WorkDir]:
    """Load the recipe and name the run's folder."""
    loaded = load_recipe(recipe, overrides)
    return loaded, WorkDir(work_dir or runtime.default_work_dir(loaded.name))


@app.command()
def run(
    recipe: RecipeFlag,
    set_: SetFlag = None,
    work_dir: WorkDirFlag = None,
    resume: ResumeFlag = "auto",
    until: UntilFlag = STAGES[-1],
) -> None:
    """Run the pipeline, skipping every stage whose artefact still matches."""
    from rellax_ds.stages.pipeline import run_until

    loaded, work = _open_run(recipe, set_, work_dir)
    run_until(until, loaded, work, resume)
    folder = work.stage_dir(until)
    typer.echo(f"report: {folder / 'report.html'}" if until == "report" else f"{until}: {folder}")


@app.command()
def assets(
    recipe: RecipeFlag,
    set_: SetFlag = None,
    work_dir: WorkDirFlag = None,
    resume: ResumeFlag = "auto",
) -> None:
    """Fetch and verify the data set and the models a recipe names; the only command that
    downloads.
    """
    from rellax_ds.assets import fetch

    loaded, _ = _open_run(recipe, set_, work_dir)
    names = [str(loaded.data.path or loaded.data.dataset), loaded.model.backbone]
    if loaded.embeddings.encoder != "backbone":
        names.append(loaded.embeddings.encoder)
    for asset in fetch(names):
        typer.echo(f"{asset.name}: {asset.reference} ({asset.source})")


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        recipe: RecipeFlag,
        set_: SetFlag = None,
        work_dir: WorkDirFlag = None,
        resume: ResumeFlag = "auto",
    ) -> None:
        from rellax_ds.stages.pipeline import run_stage

        loaded, work = _open_run(recipe, set_, work_dir)
        run_stage(stage, loaded, work, resume)
        if runtime.rank() == 0 and runtime.launcher_process() is None:
            typer.echo(f"{stage}: {work.stage_dir(stage)}")

    command.__doc__ = f"Run stage {STAGES.index(stage) + 1}, {stage}, on committed inputs."
    return command


for _stage in STAGES:
    if _stage != "shards":
        app.command(_stage)(_stage_command(_stage))


@app.command()
def plan(
    recipe: RecipeFlag,
    set_: SetFlag = None,
    work_dir: WorkDirFlag = None,
    ranks: RanksFlag = None,
    hosts: HostsFlag = 1,
    gpu_memory: GpuMemoryFlag = None,
    tokens_per_second: ThroughputFlag = None,
    json_: JsonFlag = False,
) -> None:
    """Say what training needs in memory, disk and steps, without a GPU or loading weights."""
    from rellax_ds.planning.estimate import Machines, make_plan
    from rellax_ds.planning.show import document, text

    loaded, work = _open_run(recipe, set_, work_dir)
    made = make_plan(loaded, work, Machines(ranks, hosts, gpu_memory, tokens_per_second))
    typer.echo(json.dumps(document(made), indent=2) if json_ else text(made, gpu_memory))


@app.command()
def study(
    study: StudyFlag,
    set_: SetFlag = None,
    work_dir: WorkDirFlag = None,
    only: OnlyFlag = None,
    parallel: ParallelFlag = None,
    ray: RayFlag = False,
    report_only: ReportOnlyFlag = False,
) -> None:
    """Run a grid of recipes, every shared stage once, and report on all of them together.

    What is finished is skipped. A run that fails is reported in one line, the others go on, and the
    exit status is 1.
    """
    from rellax_ds.study import expand, load_study, write_plan

    if ray and only is not None:
        raise ConfigError("--only runs in this process; leave out --ray")
    loaded = load_study(study)
    root = (work_dir or runtime.default_work_dir("studies") / loaded.name).expanduser().resolve()
    runs = expand(loaded, root, set_ or [])
    if only is not None:
        from rellax_ds.stages.study import run_one

        run_one(_named(runs, only), root)
        return
    from rellax_ds.evaluation import study as findings
    from rellax_ds.evaluation import study_page
    from rellax_ds.evaluation.study_runs import StudyRuns
    from rellax_ds.stages.launchers import LocalLauncher, RayLauncher
    from rellax_ds.stages.study import is_finished, run_all

    finished = {run.name for run in runs if is_finished(run, root)}
    write_plan(loaded, runs, root, finished)
    failures = {}
    if not report_only:
        flags = ["study", "--study", study, "--work-dir", str(root)]
        flags += [part for override in set_ or [] for part in ("--set", override)]
        todo = [run for run in runs if run.name not in finished]
        launcher = RayLauncher(todo, root) if ray else LocalLauncher()
        at_once = parallel or (len(runs) if ray else 1)
        failures = run_all(todo, root, [*flags, "--only"], launcher, at_once)
        write_plan(loaded, runs, root, {run.name for run in runs} - set(failures))
    for name, reason in failures.items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    study_page.write(findings.find(StudyRuns.read(root)), root)
    typer.echo(f"study: {root / 'study.html'}")
    if failures:
        raise typer.Exit(1)


def _named(runs: list[Run], name: str) -> Run:
    for run in runs:
        if run.name == name:
            return run
    raise ConfigError(f"--only {name}: no run of this study; choose one of plan.json")


class ShardsAction(StrEnum):
    """What `rellax shards` can do besides running the stage."""

    VERIFY = "verify"


@app.command()
def shards(
    recipe: RecipeFlag,
    action: Annotated[
        ShardsAction | None,
        typer.Argument(help="verify: check every byte of the committed shards, run nothing."),
    ] = None,
    set_: SetFlag = None,
    work_dir: WorkDirFlag = None,
    resume: ResumeFlag = "auto",
) -> None:
    """Run stage 5, shards, on committed inputs; or verify what it wrote."""
    if action is None:
        _stage_command("shards")(recipe, set_, work_dir, resume)
        return
    from rellax_ds.shards.verify import verify_shards

    _, work = _open_run(recipe, set_, work_dir)
    manifest = work.require("shards")
    for found in verify_shards(work.stage_dir("shards"), manifest.files):
        typer.echo(
            f"{found.split}: {found.samples} samples, {found.tokens} tokens, {found.shards} shards,"
            f" {found.bytes} bytes: ok"
        )


def main() -> None:
    """Run the command line; a RellaxError becomes one line from rank 0 and exit status 1."""
    runtime.prepare()
    try:
        app()
    except RellaxError as error:
        if runtime.rank() == 0:
            sys.stderr.write(f"error: {redact(' '.join(str(error).split()))}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()

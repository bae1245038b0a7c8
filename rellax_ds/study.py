"""A study: several methods over axes of one or more recipe keys, written out as runs.

A study file names recipes and the values of the keys that vary; everything else of a run is its
recipe's. Here the grid becomes a list of runs with stable names, each a complete recipe, and each
after the one whose adapter it starts from. How they are run, and where shared work is kept, is in
`rellax_ds.stages.study`; what is concluded from them in `rellax_ds.evaluation.study`.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from rellax_ds.artifacts import WorkDir, write_json
from rellax_ds.config import Recipe, load_recipe, parse_recipe, read_yaml
from rellax_ds.errors import ArtifactError, ConfigError
from rellax_ds.redaction import redacted
from rellax_ds.section import Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RUNS = "runs"
"""Folder of the runs' work folders in a study's folder."""

PLAN = "plan.json"
"""The study's runs with their recipes, as they were last planned."""

ALONE = ", LLM alone"
"""Ends the name of a blended method's LLM without its recommender, in tables and contrasts."""

_PLANNED = ("name", "description", "reference", "contrasts", "finished")
"""What the plan holds beside the runs."""

_COMMON_AXES = ("shards.history_length", "shards.train_rows", "seed")
"""Axes every run's name gives, whether or not the study varies them."""


class Method(Section):
    """One compared method; a plain string in the file is its recipe."""

    recipe: str = Field(description="Shipped recipe by name, or a YAML file beside the study's.")
    name: str = Field(default="", description="What tables call it; by default the recipe's name.")
    start_from: str | None = Field(
        default=None,
        description="Method whose adapter, of the same cell of the grid, becomes model.adapter.",
    )


class Grid(Section):
    """Methods and the values that each of them is run with."""

    methods: tuple[Method, ...] = Field(min_length=1)
    axes: dict[str, tuple[Any, ...]] = Field(
        default={}, description="Dotted recipe keys and their values."
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _strings_are_recipes(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return [{"recipe": entry} if isinstance(entry, str) else entry for entry in value]

    @field_validator("axes")
    @classmethod
    def _axes_have_values(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        empty = [key for key, values in value.items() if not values]
        if empty:
            raise ValueError(f"axis {empty[0]} has no value")
        return value


class Contrast(Section):
    """What one part of a method is worth: the method with it minus one without it."""

    part: str = Field(min_length=1, description="What tables call it.")
    method: str = Field(description="Name of the method that has the part; `NAME, LLM alone` too.")
    without: str = Field(description="Name of the method that differs in the part alone.")


class Study(Section):
    """A whole study file."""

    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""
    reference: str = Field(description="Method that the others are compared with.")
    set: dict[str, Any] = Field(
        default={}, description="Dotted recipe keys that all runs share, where no axis gives them."
    )
    grids: tuple[Grid, ...] = Field(min_length=1)
    contrasts: tuple[Contrast, ...] = Field(
        default=(), description="Pairs of methods compared on their own, at equal axes."
    )


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: Unique in the study: method, K, shots, seed and what else varies.
        method: Its method's name.
        axes: What varies beside K, shots and seed, by dotted key.
        recipe: The complete recipe.
        start_from: Name of the run whose adapter it starts from.
    """

    name: str
    method: str
    axes: dict[str, Any]
    recipe: Recipe
    start_from: str | None = None

    @property
    def cell(self) -> tuple[str, int, int, tuple[tuple[str, Any], ...]]:
        """Method, K, shots and what else varies: runs of one cell differ in the seed only."""
        shards = self.recipe.shards
        return self.method, shards.history_length, shards.train_rows, self.varied

    @property
    def varied(self) -> tuple[tuple[str, Any], ...]:
        """The further axes as keys and values; a value that is a list is given as JSON."""
        return tuple(
            (key, json.dumps(value) if isinstance(value, list | dict) else value)
            for key, value in sorted(self.axes.items())
        )

    def work(self, root: Path) -> WorkDir:
        """The run's work folder in a study's folder."""
        return WorkDir(root / RUNS / self.name)

    def document(self) -> dict[str, Any]:
        """The run as `plan.json` holds it."""
        return {
            "name": self.name,
            "method": self.method,
            "axes": self.axes,
            "start_from": self.start_from,
            "recipe": redacted(self.recipe.model_dump(mode="json")),
        }


def shipped_studies() -> dict[str, Path]:
    """Name to file of every study that ships with the package."""
    folder = Path(str(resources.files("rellax_ds"))) / "recipes" / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(name: str) -> Study:
    """Load a study by shipped name or by path.

    Raises:
        ConfigError: The file is absent or not a study.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        shipped = shipped_studies()
        if name not in shipped:
            choices = ", ".join(shipped)
            raise ConfigError(f"study '{name}' is not shipped; choose {choices} or a .yaml path")
        path = shipped[name]
    if not path.is_file():
        raise ConfigError(f"study {path}: no such file; give a path to a YAML file")
    document = {"name": path.stem, **read_yaml(path)}
    try:
        study = Study.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"study {path}: '{key}': {reason}; see docs/studies.md") from None
    grids = [
        grid.model_copy(update={"methods": tuple(_located(m, path.parent) for m in grid.methods)})
        for grid in study.grids
    ]
    return study.model_copy(update={"grids": tuple(grids)})


def expand(study: Study, root: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """The runs of a study, sources of adapters first; a run that two grids ask for is one run.

    Args:
        study: The study.
        root: The study's folder; where a run finds the adapter it starts from.
        overrides: `section.key=value` strings of the command line, for every run.

    Raises:
        ConfigError: A recipe or a value is wrong, names clash, or a run's source is not there.
    """
    found: dict[str, Run] = {}
    grids = [(method, grid.axes) for grid in study.grids for method in grid.methods]
    for method, axes in sorted(grids, key=lambda pair: pair[0].start_from is not None):
        for values in itertools.product(*axes.values()):
            cell = dict(zip(axes, values, strict=True))
            run = _run(study, method, cell, root, overrides, found)
            other = found.setdefault(run.name, run)
            if other.recipe != run.recipe:
                raise ConfigError(
                    f"study {study.name}: two different runs are called {run.name}; give one of "
                    "the methods a name of its own"
                )
    _check_names(study, list(found.values()))
    return list(found.values())


def _check_names(study: Study, runs: Sequence[Run]) -> None:
    """Refuse a reference that is none of the methods, and a contrast of what no run will give."""
    methods = {run.method for run in runs}
    blended = {run.method + ALONE for run in runs if run.recipe.model.residual != "none"}
    sides = [
        (f"contrast {c.part}", name) for c in study.contrasts for name in (c.method, c.without)
    ]
    for what, name, known in (
        ("reference", study.reference, methods),
        *((what, name, methods | blended) for what, name in sides),
    ):
        if name not in known:
            raise ConfigError(
                f"study {study.name}: {what} '{name}' is none of its methods: "
                f"{', '.join(sorted(known))}"
            )


def write_plan(study: Study, runs: Iterable[Run], root: Path, finished: Iterable[str]) -> None:
    """Say in the study's folder what it consists of; readers need no study file then.

    Args:
        study: The study.
        runs: Its runs.
        root: Its folder.
        finished: Names of the runs whose predictions are those of their recipes; a run that was
            changed and not run again still has its old ones.
    """
    root.mkdir(parents=True, exist_ok=True)
    document = {
        "name": study.name,
        "description": study.description,
        "reference": study.reference,
        "contrasts": [contrast.model_dump() for contrast in study.contrasts],
        "finished": sorted(finished),
        "runs": [run.document() for run in runs],
    }
    write_json(root / PLAN, document)


def read_plan(root: Path) -> tuple[dict[str, Any], list[Run]]:
    """Name, description, reference, contrasts and finished runs of a study's folder, and all runs.

    Raises:
        ArtifactError: The folder holds no plan.
    """
    path = root / PLAN
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        runs = [
            Run(**{**entry, "recipe": parse_recipe(entry["recipe"], str(path))})
            for entry in document.pop("runs")
        ]
        plan = {key: document[key] for key in _PLANNED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: no plan of a study ({error}); run `rellax study`") from None
    return plan, runs


def _located(method: Method, folder: Path) -> Method:
    """The method with its recipe found beside the study's file, and with a name."""
    beside = folder / method.recipe
    recipe = str(beside) if beside.is_file() else method.recipe
    name = method.name or Path(method.recipe).name.removesuffix(".yaml")
    return method.model_copy(update={"recipe": recipe, "name": name})


def _run(
    study: Study,
    method: Method,
    cell: dict[str, Any],
    root: Path,
    overrides: Sequence[str],
    found: dict[str, Run],
) -> Run:
    given = [f"{key}={json.dumps(value)}" for key, value in {**study.set, **cell}.items()]
    given += overrides
    recipe = load_recipe(method.recipe, given)
    others = {key: value for key, value in cell.items() if key not in _COMMON_AXES}
    source = None
    if method.start_from is not None:
        source = _source(method, recipe, others, found)
        adapter = source.work(root).stage_dir("train") / "adapter"
        recipe = load_recipe(method.recipe, [*given, f"model.adapter={json.dumps(str(adapter))}"])
    name = f"{method.name}-{cell_name(recipe, others)}"
    recipe = recipe.model_copy(update={"name": name})
    return Run(name, method.name, others, recipe, source.name if source else None)


def _source(method: Method, recipe: Recipe, axes: dict[str, Any], found: dict[str, Run]) -> Run:
    """The run a run starts from: the same cell, or else the one without the further axes."""
    for others in (axes, {}):
        run = found.get(f"{method.start_from}-{cell_name(recipe, others)}")
        if run is not None:
            return run
    raise ConfigError(
        f"study: {method.name} starts from {method.start_from}, which has no run "
        f"{cell_name(recipe, axes)}; add it to a grid with the same axes"
    )


def cell_name(recipe: Recipe, axes: dict[str, Any]) -> str:
    """K, shots, seed and the further axes, as a run's name gives them."""
    shards = recipe.shards
    parts = [f"K{shards.history_length}", f"n{shards.train_rows}", f"s{recipe.seed}"]
    parts += [f"{key.rpartition('.')[2]}-{value}" for key, value in sorted(axes.items())]
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))

"""The pipeline: the eight stages in order, run until a named one.

Stages are imported one at a time, when they are reached, so that `rellax tables` does not load a
deep-learning framework and a missing extra stops only the stage that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rellax_ds.artifacts import STAGES, Manifest, WorkDir
from rellax_ds.errors import ConfigError
from rellax_ds.partitions import disconnect

if TYPE_CHECKING:
    from rellax_ds.config import Recipe
    from rellax_ds.stages.stage import Stage


def load_stage(name: str) -> Stage:
    """The declaration of a stage.

    Raises:
        ConfigError: `name` is not one of the eight stages.
    """
    if name not in STAGES:
        raise ConfigError(f"stage '{name}' does not exist; choose one of {', '.join(STAGES)}")
    stage: Stage = importlib.import_module(f"rellax_ds.stages.{name}").STAGE
    return stage


def run_stage(name: str, recipe: Recipe, work: WorkDir, resume: str = "auto") -> Manifest:
    """Run one stage, or skip it when its artefact still matches; its inputs must be committed.

    Args:
        name: One of the eight stages.
        recipe: The run's recipe.
        work: The run's folder.
        resume: Whether an interrupted training continues: `auto`, `never` or a checkpoint folder.
    """
    if name == "train":
        from rellax_ds.stages.train import run_train

        disconnect()  # a local cluster's processes would share the ranks' cores and memory
        return run_train(recipe, work, resume)
    return load_stage(name).run(recipe, work)


def run_until(last: str, recipe: Recipe, work: WorkDir, resume: str = "auto") -> list[Manifest]:
    """Run the stages from the first up to and including `last`."""
    if last not in STAGES:
        raise ConfigError(f"stage '{last}' does not exist; choose one of {', '.join(STAGES)}")
    names = STAGES[: STAGES.index(last) + 1]
    return [run_stage(name, recipe, work, resume) for name in names]

"""Stage 6's parts on one rank, in this process, for benchmarks that time them.

Everything is made as the stage makes it: shards, model, ZeRO-3 engine. Stages 1, 4 and 5 are run,
or skipped where their artefacts are in the work folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rellax_ds import runtime
from rellax_ds.artifacts import WorkDir
from rellax_ds.engine.ds_config import resolve_ds_config
from rellax_ds.stages.pipeline import load_stage
from rellax_ds.stages.train import make_model
from rellax_ds.training.stream import PromptStream

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.config import Recipe
    from rellax_ds.engine.engine import Engine

STAGES = ("tables", "crm", "shards")


def made_shards(recipe: Recipe, work_dir: Path | None) -> Path:
    """Folder of the recipe's shards in `work_dir`, by default the recipe's own."""
    work = WorkDir(work_dir or runtime.default_work_dir(recipe.name))
    for stage in STAGES:
        load_stage(stage).run(recipe, work)
    return work.stage_dir("shards")


def open_engine(recipe: Recipe, stream: PromptStream, threads: int) -> Engine:
    """The engine with the recipe's model, in so many threads of torch."""
    from rellax_ds.engine.engine import Engine
    from rellax_ds.engine.processes import start_processes

    processes = start_processes()
    torch.set_num_threads(threads)
    resolved = resolve_ds_config(recipe.train, 1)
    return Engine(lambda: make_model(recipe, stream), recipe.train, resolved, processes)

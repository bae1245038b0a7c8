"""Stage 6, train: shards and an LLM to an adapter (CFLoRA and SPA), on one or many ranks.

All ranks enter `run_train`; rank 0 decides, writes and commits, the others follow what it
announces. Started without a launcher, the recipe's number of processes is launched here, or the
training runs in this process when that number is one. Whether it succeeded is read from the
committed manifest in every case.

Left out of the key, because they change speed and comfort but not what is learned: the number of
ranks, micro_batch, eval_batch, how often and how many checkpoints are kept, max_skips, verify,
hang_timeout and wandb. The DeepSpeed JSON counts by content, not by path.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from rellax_ds import runtime
from rellax_ds.artifacts import Manifest, StageRun, WorkDir, file_sha256, write_bytes, write_json
from rellax_ds.assets import resolve_model
from rellax_ds.config import Recipe, TrainConfig, digest
from rellax_ds.engine.ds_config import ds_config_digest, resolve_ds_config
from rellax_ds.engine.launch import launch_ranks
from rellax_ds.engine.watchdog import RANKS, Watchdog
from rellax_ds.errors import ArtifactError, CheckpointError
from rellax_ds.stages.stage import Stage, StageContext
from rellax_ds.training.signals import EXIT_STOPPED, STOP_FILE, StopRequest

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from rellax_ds.engine.checkpoint import Checkpoint
    from rellax_ds.engine.engine import Engine, ParameterGroup
    from rellax_ds.engine.processes import Processes
    from rellax_ds.model.rellax import ReLLaX
    from rellax_ds.training.loop import LoopState
    from rellax_ds.training.sinks import Sinks
    from rellax_ds.training.stream import PromptStream

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
SCORED = "scored.jsonl"

_LAUNCHED = "launched.yaml"
_STOPPED = "STOPPED"
"""Left by an agreed stop for the process that launched the ranks: launchers hide statuses."""

_NEUTRAL = frozenset(
    {
        "checkpoint_every",
        "ds_config",
        "eval_batch",
        "hang_timeout",
        "keep_last",
        "max_skips",
        "micro_batch",
        "num_processes",
        "verify",
        "wandb",
        "wandb_project",
    }
)
_SECTIONS = (
    "seed",
    "model",
    *(f"train.{key}" for key in TrainConfig.model_fields if key not in _NEUTRAL),
)


def run_train(recipe: Recipe, work: WorkDir, resume: str = "auto") -> Manifest:
    """Train, or skip when the committed adapter still matches; every rank calls it.

    Args:
        recipe: The run's recipe.
        work: The run's folder; stage 5 must be committed.
        resume: `auto` continues from the newest valid checkpoint, `never` starts over, a path
            continues from that checkpoint.

    Returns:
        The committed manifest.

    Raises:
        RellaxError: The recipe, the shards or a checkpoint cannot be used.
        SystemExit: The training was asked to stop and has left a checkpoint (status 143).
    """
    if runtime.launched() or recipe.train.num_processes == 1:
        return _run_here(recipe, work, resume)
    attempt = _attempt(recipe, work)
    committed = _skip(attempt)
    if committed is not None:
        return committed
    status = _launch(recipe, attempt, resume)
    manifest = attempt.committed()
    if manifest is None and (status == EXIT_STOPPED or (attempt.directory / _STOPPED).exists()):
        raise SystemExit(EXIT_STOPPED)
    if manifest is None:
        raise ArtifactError(
            f"train: the ranks ended (launcher status {status}) without committing "
            f"{work.stage_dir('train')}; their message is above"
        )
    return manifest


def _run_here(recipe: Recipe, work: WorkDir, resume: str) -> Manifest:
    from rellax_ds.engine.processes import start_processes
    from rellax_ds.training.loop import StopTraining

    processes = start_processes(recipe.train.hang_timeout)
    attempt = processes.from_rank_zero(lambda: _attempt(recipe, work))
    committed = processes.from_rank_zero(lambda: _skip(attempt))
    if committed is not None:
        processes.close()
        return committed
    processes.from_rank_zero(lambda: _begin(attempt, resume))
    context = StageContext(recipe, work, attempt.directory, attempt.key)
    with StopRequest(processes, attempt.directory / STOP_FILE) as stop:
        try:
            with Watchdog(processes, attempt.directory / RANKS, recipe.train.hang_timeout):
                counts = _train(context, processes, stop, resume)
        except StopTraining as stopped:
            if processes.first:
                runtime.logger.warning("%s", stopped)
                with contextlib.suppress(OSError):  # on a full disk the status has to do
                    (attempt.directory / _STOPPED).touch()
            processes.close()
            raise SystemExit(EXIT_STOPPED) from None
        manifest = processes.from_rank_zero(lambda: _commit(attempt, counts))
        processes.close()
    return manifest


def _train(
    context: StageContext, processes: Processes, stop: StopRequest, resume: str
) -> dict[str, Any]:
    """Build the parts, run the loop on all ranks and write the artefact's files."""
    from rellax_ds.engine.checkpoint import CheckpointStore
    from rellax_ds.engine.engine import Engine
    from rellax_ds.shards.read import INDEX
    from rellax_ds.training.loop import ADAPTER, Loop
    from rellax_ds.training.sinks import Sinks
    from rellax_ds.training.stream import PromptStream

    recipe, directory = context.recipe, context.directory
    resolved = resolve_ds_config(recipe.train, processes.world_size)
    processes.from_rank_zero(lambda: write_json(directory / "ds_config.json", resolved))
    if processes.first:
        runtime.logger.info("train: DeepSpeed takes %s", json.dumps(resolved))
    stream = PromptStream(context.input("shards"), recipe, processes.rank, processes.world_size)
    processes.from_rank_zero(stream.verify)
    store = CheckpointStore(directory / CHECKPOINTS, processes, recipe.train.keep_last)
    checkpoint = store.choose(resume)
    _check_belongs(checkpoint, recipe, stream)
    processes.at("the loading of the model")
    engine = Engine(lambda: make_model(recipe, stream), recipe.train, resolved, processes)
    state = _restore(engine, checkpoint, directory)
    opened: list[Sinks] = []
    resumed = checkpoint is not None
    processes.from_rank_zero(lambda: opened.append(_open_sinks(context, stream, state, resumed)))
    sinks = opened[0] if opened else Sinks()
    try:
        loop = Loop(engine, stream, recipe, store, sinks, stop, directory, state)
        state = loop.run()
        sinks.keep(directory / ADAPTER, stream.index.folder / INDEX)
    finally:
        sinks.close()
        stream.close()
    if processes.first:
        write_json(directory / "best.json", _best(state))
    trained = sum(_numel(p) for p in engine.trainable.values())
    engine.close()
    return _best(state) | {
        "steps": state.step,
        "skipped": state.skipped,
        "rows": state.step * recipe.train.global_batch,
        "ranks": processes.world_size,
        "trained_parameters": trained,
    }


def make_model(recipe: Recipe, stream: PromptStream) -> tuple[nn.Module, list[ParameterGroup]]:
    """The recipe's model for these shards, and its trainable groups; every rank calls it."""
    import torch

    from rellax_ds.model.rellax import build_rellax

    runtime.seed_everything(recipe.seed, "model")
    yes, no = stream.index.answer_ids
    model = build_rellax(
        resolve_model(recipe.model.backbone).reference,
        recipe.model,
        {"yes": yes, "no": no},
        stream.index.item_width,
        stream.index.instance_width,
        torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
        recipe.train.loss,
    )
    if recipe.train.gradient_checkpointing:
        model.enable_gradient_checkpointing(recipe.train.reentrant_checkpointing)
    return model, _parameter_groups(model, recipe.train)


def _parameter_groups(model: ReLLaX, train: TrainConfig) -> list[ParameterGroup]:
    """Groups by learning rate, and by weight decay, which vectors are spared."""
    from rellax_ds.engine.engine import ParameterGroup
    from rellax_ds.model.rellax import trainable_groups

    groups = []
    for name, parameters in trainable_groups(model).items():
        rate = train.learning_rate if name == "factors" else train.interaction_learning_rate
        matrices = {n: p for n, p in parameters.items() if len(_shape(p)) > 1}
        vectors = {n: p for n, p in parameters.items() if len(_shape(p)) <= 1}
        if matrices:
            groups.append(ParameterGroup(name, matrices, rate, train.weight_decay))
        if vectors:
            groups.append(ParameterGroup(f"{name} without decay", vectors, rate, 0.0))
    return groups


def _restore(engine: Engine, checkpoint: Checkpoint | None, directory: Path) -> LoopState:
    from rellax_ds.engine import elastic
    from rellax_ds.engine.checkpoint import TENSORS
    from rellax_ds.training.loop import ADAPTER, LoopState

    if checkpoint is None:
        return LoopState()
    elastic.restore(engine, checkpoint.path / TENSORS)
    if engine.processes.first:
        shutil.rmtree(directory / ADAPTER, ignore_errors=True)
        if (checkpoint.path / ADAPTER).is_dir():
            shutil.copytree(checkpoint.path / ADAPTER, directory / ADAPTER)
        runtime.logger.info("train: continues from %s", checkpoint.path)
    engine.processes.barrier()
    return LoopState(**checkpoint.state["loop"])


def _open_sinks(
    context: StageContext, stream: PromptStream, state: LoopState, resumed: bool
) -> Sinks:
    """Rank 0's sinks; their files continue after what the checkpoint knows of."""
    from rellax_ds.training.scored import ScoredPrompts
    from rellax_ds.training.sinks import JsonlSink, Sinks, rewind
    from rellax_ds.training.wandb_sink import WandbSink

    recipe = context.recipe
    log, scored = context.directory / LOG, context.directory / SCORED
    for path in (log, scored):
        if resumed:
            rewind(path, state.step, state.scored)
        else:
            path.unlink(missing_ok=True)
    watched = ScoredPrompts(stream.watched(), resolve_model(recipe.model.backbone).reference)
    begun = scored.is_file()
    shown = JsonlSink(scored)
    if not begun:
        for record in watched.prompts():
            shown.write(record)
    group = f"{recipe.name}-{context.key[:12]}"
    wandb = recipe.train.wandb != "off"
    return Sinks(
        JsonlSink(log),
        (shown, watched),
        WandbSink(recipe, context.work.root, group) if wandb else None,
    )


def _check_belongs(checkpoint: Checkpoint | None, recipe: Recipe, stream: PromptStream) -> None:
    """Refuse a checkpoint of another recipe or other shards, naming what differs."""
    from rellax_ds.training.loop import LoopState, checkpoint_state

    if checkpoint is None:
        return
    ours = checkpoint_state(LoopState(), recipe, stream)
    theirs = checkpoint.state
    differing = [key for key in ("seed", "global_batch", "shards") if ours[key] != theirs[key]]
    for section, values in ours["recipe"].items():
        differing += [
            f"{section}.{key}"
            for key, value in values.items()
            if key not in _NEUTRAL and theirs["recipe"][section].get(key) != value
        ]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: was written with other values of {', '.join(differing)}; "
            "use that recipe, or --resume never"
        )


def _attempt(recipe: Recipe, work: WorkDir) -> StageRun:
    return work.open("train", STAGE.parts(recipe, work), recipe.model_dump(mode="json"))


def _skip(attempt: StageRun) -> Manifest | None:
    manifest = attempt.committed()
    if manifest is not None:
        folder = attempt.work.stage_dir("train")
        runtime.logger.info("train: up to date (%s), skipped", folder)
    return manifest


def _begin(attempt: StageRun, resume: str) -> None:
    changes = attempt.changes()
    if changes:
        runtime.logger.info("train: runs again because %s changed", ", ".join(changes))
    directory = attempt.begin(keep_others=True)
    if resume == "never":
        shutil.rmtree(directory)
        directory.mkdir()
    if runtime.launcher_process() is None:  # else it was removed there, and may be asked for by now
        (directory / STOP_FILE).unlink(missing_ok=True)
    shutil.rmtree(directory / RANKS, ignore_errors=True)


def _commit(attempt: StageRun, counts: dict[str, Any]) -> Manifest:
    directory = attempt.directory
    for name in (CHECKPOINTS, RANKS):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in (STOP_FILE, _STOPPED, _LAUNCHED):
        (directory / name).unlink(missing_ok=True)
    manifest = attempt.commit(counts)
    folder = attempt.work.stage_dir("train")
    runtime.logger.info("train: committed %s in %.1f s", folder, manifest.seconds)
    return manifest


def _launch(recipe: Recipe, attempt: StageRun, resume: str) -> int:
    """Start the ranks with the recipe as it is resolved here, and wait for them."""
    resolve_ds_config(recipe.train, recipe.train.num_processes)
    attempt.directory.mkdir(parents=True, exist_ok=True)
    (attempt.directory / _STOPPED).unlink(missing_ok=True)
    path = attempt.directory / _LAUNCHED
    write_bytes(path, yaml.safe_dump(recipe.model_dump(mode="json")).encode())
    arguments = ["train", "--recipe", str(path), "--work-dir", str(attempt.work.root)]
    return launch_ranks(
        recipe.train.num_processes,
        [*arguments, "--resume", resume],
        attempt.directory / STOP_FILE,
    )


def _best(state: LoopState) -> dict[str, Any]:
    return {
        "step": state.best_step,
        "valid_auc": state.best_auc,
        "untrained": state.untrained,
        "centre": state.centre,
        "blend": state.blend,
    }


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _identities(recipe: Recipe) -> dict[str, str]:
    """What backbone, DeepSpeed JSON and starting adapter are, whatever they are called."""
    parts = {
        "model backbone": resolve_model(recipe.model.backbone).identity,
        "DeepSpeed JSON": ds_config_digest(recipe.train),
    }
    if recipe.model.adapter is not None:
        files = sorted(p for p in recipe.model.adapter.glob("*") if p.is_file())
        parts["model adapter"] = digest({p.name: file_sha256(p) for p in files})
    return parts


@dataclass(frozen=True)
class TrainStage(Stage):
    """The one stage that runs on many ranks; everything else is as for any stage."""

    def run(self, recipe: Recipe, work: WorkDir) -> Manifest:
        """Run or skip, continuing an interrupted training."""
        return run_train(recipe, work)


def _build(_context: StageContext) -> dict[str, Any]:
    raise ArtifactError("train: this stage runs on every rank; call run_train, not its build")


STAGE = TrainStage(
    name="train",
    version=2,
    sections=_SECTIONS,
    inputs=lambda _recipe: ("shards",),
    build=_build,
    identities=_identities,
)

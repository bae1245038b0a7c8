"""The plan of a run, and the refusal of one that cannot work.

A recipe that does not fit is found in seconds here and after an hour of loading on the machine, so
the refusal names the largest term and the nearest knob that still turns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rellax_ds.engine.ds_config import accumulation_steps, resolve_ds_config
from rellax_ds.errors import ConfigError
from rellax_ds.planning import memory
from rellax_ds.planning.memory import GIB, Layout, Load, Term
from rellax_ds.planning.parameters import read_config, shape_of
from rellax_ds.planning.work import committed_index, prompts_of, work_of

if TYPE_CHECKING:
    from rellax_ds.artifacts import WorkDir
    from rellax_ds.config import Recipe
    from rellax_ds.planning.parameters import ModelShape
    from rellax_ds.planning.work import Work
    from rellax_ds.shards.read import ShardIndex


@dataclass(frozen=True)
class Machines:
    """What the run is planned for.

    Attributes:
        ranks: Ranks of the training; None takes `train.num_processes`.
        hosts: Machines they are spread over evenly.
        gpu_memory: GiB of one GPU; None leaves the fit unchecked.
        tokens_per_second: Measured throughput of training, all ranks together.
    """

    ranks: int | None = None
    hosts: int = 1
    gpu_memory: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Plan:
    """Everything `rellax plan` says.

    Attributes:
        recipe: Name of the recipe.
        backbone: `model.backbone`.
        source: Which config of it was read.
        ranks: N.
        hosts: Machines.
        stage: ZeRO stage.
        precision: Of the training.
        quantization: Of the frozen linear layers.
        cuda: Whether the ranks are taken to compute on GPUs.
        micro_batch: Prompts of one forward pass.
        accumulation: Micro-batches of a rank in one step.
        tokens: Tokens of the longest micro-batch at most.
        tokens_exact: Whether that was counted in committed shards.
        shape: Parameters and widths.
        terms: Memory of a rank.
        largest_fetch: Bytes of the largest module's own parameters: the least a gather needs.
        work: Steps, tokens, disk.
    """

    recipe: str
    backbone: str
    source: str
    ranks: int
    hosts: int
    stage: int
    precision: str
    quantization: str
    cuda: bool
    micro_batch: int
    accumulation: int
    tokens: int
    tokens_exact: bool
    shape: ModelShape
    terms: tuple[Term, ...]
    largest_fetch: int
    work: Work

    @property
    def total(self) -> Term:
        """Memory of a rank."""
        return memory.total(self.terms)


def make_plan(recipe: Recipe, work: WorkDir, machines: Machines) -> Plan:
    """Plan the training of a recipe; loads no weight and needs no GPU.

    Args:
        recipe: The recipe.
        work: The run's folder; what is committed there is counted instead of bounded.
        machines: What it would run on.

    Raises:
        AssetError: The backbone has no config here.
        ConfigError: The ranks cannot share the batch, the hosts cannot share the ranks, or a rank
            does not fit into the GPU's memory.
    """
    train, ranks = recipe.train, machines.ranks or recipe.train.num_processes
    if ranks % machines.hosts:
        raise ConfigError(
            f"{ranks} ranks cannot be spread evenly over {machines.hosts} hosts; change --ranks or "
            "--hosts"
        )
    resolved = resolve_ds_config(train, ranks)
    layout = Layout.of(resolved, ranks)
    index = committed_index(recipe, work)
    item_dim, instance_dim = _widths(recipe, work, index)
    config, source = read_config(recipe.model.backbone)
    shape = shape_of(config, recipe.model, item_dim, instance_dim)
    prompts = prompts_of(recipe, work, index, instance_dim)
    answers = 1 + (recipe.shards.history_length if train.history_weight else 0)
    cuda = machines.gpu_memory is not None or train.precision == "bf16"
    load = Load(
        tokens=train.micro_batch * prompts["train"].longest,
        eval_tokens=train.eval_batch * prompts["valid"].longest,
        answers=train.micro_batch * answers,
        vocabulary_loss=train.loss == "vocabulary",
        checkpointing=train.gradient_checkpointing,
        cuda=cuda,
    )
    made = Plan(
        recipe=recipe.name,
        backbone=recipe.model.backbone,
        source=source,
        ranks=ranks,
        hosts=machines.hosts,
        stage=layout.stage,
        precision=train.precision,
        quantization=recipe.model.quantization,
        cuda=cuda,
        micro_batch=train.micro_batch,
        accumulation=accumulation_steps(train.global_batch, train.micro_batch, ranks),
        tokens=load.tokens,
        tokens_exact=prompts["train"].exact,
        shape=shape,
        terms=tuple(memory.terms(shape, layout, load)),
        largest_fetch=memory.largest_module(shape.weights, layout.element),
        work=work_of(recipe, prompts, shape, machines.tokens_per_second),
    )
    if machines.gpu_memory is not None:
        _check_fits(made, recipe, layout, machines.gpu_memory)
    return made


def _check_fits(plan: Plan, recipe: Recipe, layout: Layout, gpu_memory: float) -> None:
    needed = plan.total.device
    if needed <= gpu_memory * GIB:
        return
    largest = max(plan.terms, key=lambda term: term.device)
    raise ConfigError(
        f"{plan.recipe} on {plan.ranks} ranks needs {needed / GIB:.1f} GiB a GPU, --gpu-memory is "
        f"{gpu_memory:g}; the largest term is {largest.name} with {largest.device / GIB:.1f} GiB: "
        f"{_remedy(largest.name, recipe, layout)}"
    )


def _remedy(term: str, recipe: Recipe, layout: Layout) -> str:
    """The nearest knob for a term that still turns."""
    train, offload = recipe.train, "ds_configs/zero3_bf16_offload.json"
    if term == "activations":
        if not train.gradient_checkpointing:
            return "set train.gradient_checkpointing=true"
        if train.micro_batch > 1:
            return f"lower train.micro_batch (it is {train.micro_batch})"
        return f"lower shards.max_tokens (it is {recipe.shards.max_tokens})"
    if term == "activations in evaluation":
        return f"lower train.eval_batch (it is {train.eval_batch})"
    if term == "answer logits":
        return "set train.loss=yes_no, or lower train.micro_batch"
    if term == "gather window":
        return f"lower stage3_max_live_parameters in {train.ds_config}"
    if term == "persistent weights":
        return f"lower stage3_param_persistence_threshold in {train.ds_config}"
    if term == "reduce bucket":
        return f"lower reduce_bucket_size in {train.ds_config}"
    if term == "frozen weights":
        if layout.stage < 3:
            return f"use ZeRO stage 3 (zero_optimization.stage in {train.ds_config})"
        if recipe.model.quantization == "none":
            return f"use more ranks, model.quantization=nf4 or train.ds_config={offload}"
        return f"use more ranks, or train.ds_config={offload}"
    if term in ("trained weights", "gradients", "Adam state"):
        return f"use more ranks or train.ds_config={offload}, or lower model.rank"
    return "use a GPU with more memory"


def _widths(recipe: Recipe, work: WorkDir, index: ShardIndex | None) -> tuple[int, int]:
    """Widths of the recommender's item embeddings and of h."""
    if index is not None:
        return index.item_width, index.instance_width
    crm = recipe.crm
    if crm.instance_embedding == "final":
        return crm.embedding_dim, crm.hidden_dim
    manifest = work.manifest("crm")
    if manifest is not None and manifest.recipe["crm"] == recipe.model_dump(mode="json")["crm"]:
        from rellax_ds.crm.network import Architecture

        path = work.stage_dir("crm") / "model.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        return crm.embedding_dim, Architecture(**document["architecture"]).instance_dim
    raise ConfigError(
        f"crm.instance_embedding '{crm.instance_embedding}' is as wide as the data has fields, "
        "which stage 4 finds out; run `rellax run --until crm` first, or plan with 'final'"
    )

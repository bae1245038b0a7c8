"""Stage 5, shards: samples to tokenised prompts with slots, CRM vectors and an index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rellax_ds import schema
from rellax_ds.assets import resolve_model
from rellax_ds.partitions import Partition, drop_records, run_partitions
from rellax_ds.prompts.templates import load_template
from rellax_ds.shards import pool
from rellax_ds.shards.index import write_index
from rellax_ds.shards.read import CRM
from rellax_ds.shards.write import ShardWorker, write_scale
from rellax_ds.stages.stage import Stage, StageContext

if TYPE_CHECKING:
    from rellax_ds.config import Recipe
    from rellax_ds.prompts.render import PromptBuilder
    from rellax_ds.shards.pool import Row


def _inputs(recipe: Recipe) -> tuple[str, ...]:
    if recipe.shards.history == "recent":
        return ("tables", "crm")
    return ("tables", "retrieval", "crm")


def _identities(recipe: Recipe) -> dict[str, str]:
    return {
        "backbone": resolve_model(recipe.model.backbone).identity,
        "template": load_template(recipe.shards.template).digest,
        "like rule": recipe.data.like_rule,
    }


def partitions(rows: dict[str, list[Row]], samples_per_shard: int) -> list[Partition]:
    """One partition a shard, named SPLIT-00000, splits in order."""
    return [
        Partition(
            f"{split}-{number:05d}",
            {"split": split, "rows": rows[split][start : start + samples_per_shard]},
        )
        for split in schema.SPLITS
        for number, start in enumerate(range(0, len(rows[split]), samples_per_shard))
    ]


def settings(context: StageContext) -> dict[str, Any]:
    """Keyword arguments of `ShardWorker` for a recipe."""
    recipe = context.recipe
    retrieved = recipe.shards.history != "recent"
    return {
        "tables": str(context.input("tables")),
        "crm": str(context.input("crm")),
        "retrieval": str(context.input("retrieval")) if retrieved else None,
        "scale": str(context.directory / CRM),
        "tokenizer": resolve_model(recipe.model.backbone).reference,
        "template": load_template(recipe.shards.template).document(),
        "chat": recipe.shards.chat,
        "soft_slots": recipe.model.spa,
        "history_length": recipe.shards.history_length,
        "max_tokens": recipe.shards.max_tokens,
        "like_rule": recipe.data.like_rule,
        "suffix_variant": recipe.shards.history in pool.MIXED,
    }


def build(context: StageContext) -> dict[str, Any]:
    """Choose the rows, write the scale and the shards, and merge the index."""
    recipe = context.recipe
    tables, crm = context.input("tables"), context.input("crm")
    split_of = pool.read_splits(tables)
    holdout_start = pool.read_holdout_start(crm) if recipe.shards.train_from == "holdout" else None
    folds = pool.read_folds(crm)
    rows = pool.choose_rows(split_of, recipe.shards, recipe.seed, holdout_start, folds)
    candidates = pool.training_candidates(split_of, recipe.shards, holdout_start, folds)
    facts: dict[str, Any] = write_scale(crm, context.directory / CRM, candidates)
    arguments = settings(context)
    builder = ShardWorker(**arguments).builder
    facts |= _facts(recipe, builder)
    arguments["cuts"] = builder.cuts
    records = run_partitions(
        "shards",
        partitions(rows, recipe.shards.samples_per_shard),
        ShardWorker,
        arguments,
        context.directory,
        context.key,
    )
    document = write_index(context.directory, records, facts)
    drop_records(context.directory, records)
    return {**document["splits"], "history_supervised": document["history_supervised"]}


def _facts(recipe: Recipe, builder: PromptBuilder) -> dict[str, Any]:
    """What the index says about wording and tokenizer."""
    template = load_template(recipe.shards.template)
    return {
        "answer_ids": {"yes": builder.answer_ids.yes, "no": builder.answer_ids.no},
        "history_supervised": builder.history_supervised,
        "template": {"digest": template.digest, **template.document()},
        "tokenizer": builder.tokens.digest,
        "backbone": resolve_model(recipe.model.backbone).identity,
        "boundaries": builder.boundaries,
        "chat": builder.wrapped,
        "soft_slots": recipe.model.spa,
        "slot_id": builder.tokens.slot_id,
        "max_tokens": recipe.shards.max_tokens,
        "history": recipe.shards.history,
        "mixed": recipe.shards.history in pool.MIXED,
        "history_length": recipe.shards.history_length,
        "seed": recipe.seed,
    }


STAGE = Stage(
    name="shards",
    version=3,
    sections=("shards", "model.backbone", "model.spa", "seed"),
    inputs=_inputs,
    build=build,
    identities=_identities,
)

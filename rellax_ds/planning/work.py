"""How much there is to do: prompts, steps, tokens, and what lies on disk afterwards.

Committed shards are counted; without them a count comes from the recipe, from committed tables or
from the published size of an official release, tokens are an upper bound and every figure says so.
No time is invented: it follows from a throughput the caller has measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rellax_ds import schema
from rellax_ds.shards.order import steps_per_epoch
from rellax_ds.shards.pool import read_splits
from rellax_ds.shards.read import ShardIndex
from rellax_ds.tables.oracles import RELEASES, follows_published_rules

if TYPE_CHECKING:
    from rellax_ds.artifacts import WorkDir
    from rellax_ds.config import Recipe
    from rellax_ds.planning.parameters import ModelShape

_READ_BY_SHARDS = ("data", "shards", "crm", "seed")
_SAMPLE_BYTES, _EVENT_BYTES, _BLOCK = 200, 9, 512
_MEMBERS, _ARRAY_HEADER = 3, 128


@dataclass(frozen=True)
class Prompts:
    """The prompts of one split.

    Attributes:
        rows: Their number, None where only the tables can tell.
        shards: Files they lie in.
        tokens: Of all of them, soft-token slots included.
        longest: Tokens of the longest.
        disk: Bytes of their files.
        source: Where the figures come from.
        exact: Whether tokens, longest and disk were counted; else they are upper bounds.
    """

    rows: int | None
    shards: int | None
    tokens: int | None
    longest: int
    disk: int | None
    source: str
    exact: bool


@dataclass(frozen=True)
class Work:
    """What stage 6 does, and what the run leaves on disk.

    Attributes:
        prompts: By split.
        steps_per_epoch: Optimiser steps in an epoch.
        steps: Optimiser steps of the run, if it is not stopped early.
        samples: Prompts trained on, each epoch anew.
        tokens: Tokens trained on.
        valid_scores: Times the valid split is scored.
        checkpoint: Bytes of one checkpoint.
        checkpoints: Bytes of those kept, with the best one and one being written.
        adapter: Bytes of the adapter.
        seconds: Of the training steps at the given throughput; None without one.
    """

    prompts: dict[str, Prompts]
    steps_per_epoch: int
    steps: int
    samples: int
    tokens: int
    valid_scores: int
    checkpoint: int
    checkpoints: int
    adapter: int
    seconds: float | None


def committed_index(recipe: Recipe, work: WorkDir) -> ShardIndex | None:
    """Index of the committed shards, if they were written under these settings.

    Raises:
        ShardError: They were, and their index is damaged.
    """
    manifest = work.manifest("shards")
    if manifest is None:
        return None
    ours, theirs = recipe.model_dump(mode="json"), manifest.recipe
    same = all(theirs.get(key) == ours[key] for key in _READ_BY_SHARDS)
    model = theirs.get("model", {})
    same = same and all(model.get(key) == ours["model"][key] for key in ("backbone", "spa"))
    return ShardIndex.open(work.stage_dir("shards")) if same else None


def prompts_of(
    recipe: Recipe, work: WorkDir, index: ShardIndex | None, instance_dim: int
) -> dict[str, Prompts]:
    """The prompts of every split, counted or bounded."""
    if index is not None:
        return {split: _counted(index, split) for split in schema.SPLITS}
    sizes, source = _split_sizes(recipe, work)
    found = {}
    for split in schema.SPLITS:
        rows = getattr(recipe.shards, f"{split}_rows")
        told = "the recipe"
        if rows is None:
            rows, told = sizes.get(split), source
        elif split == "train" and recipe.shards.history == "mixed":
            rows *= 2
        found[split] = _bounded(recipe, rows, told, instance_dim)
    return found


def work_of(
    recipe: Recipe,
    prompts: dict[str, Prompts],
    shape: ModelShape,
    tokens_per_second: float | None,
) -> Work:
    """Steps, tokens and disk of a recipe.

    Args:
        recipe: The recipe.
        prompts: From `prompts_of`.
        shape: The model's parameters.
        tokens_per_second: Tokens trained on in a second, all ranks together.

    Raises:
        ConfigError: There are fewer training prompts than one global batch.
    """
    train = recipe.train
    rows, all_tokens = prompts["train"].rows, prompts["train"].tokens
    assert rows is not None, "a recipe gives train_rows"
    assert all_tokens is not None, "tokens are known where rows are"
    per_epoch = steps_per_epoch(rows, train.global_batch)
    steps = train.epochs * per_epoch
    samples = steps * train.global_batch
    tokens = round(all_tokens * samples / rows)
    trained = sum(w.numel for w in shape.weights if w.trained)
    adapter = sum(w.numel for w in shape.weights if w.group != "backbone") * 4
    checkpoint = 12 * trained + adapter
    return Work(
        prompts,
        per_epoch,
        steps,
        samples,
        tokens,
        valid_scores=1 + -(-steps // (train.eval_every or per_epoch)),
        checkpoint=checkpoint,
        checkpoints=(train.keep_last + 2) * checkpoint,
        adapter=adapter,
        seconds=tokens / tokens_per_second if tokens_per_second else None,
    )


def _counted(index: ShardIndex, split: str) -> Prompts:
    shards = index.document["shards"][split]
    lengths = index.rows(split).column("tokens").to_numpy()
    return Prompts(
        rows=len(lengths),
        shards=len(shards),
        tokens=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        disk=sum(int(shard["bytes"]) for shard in shards),
        source="committed shards",
        exact=True,
    )


def _bounded(recipe: Recipe, rows: int | None, source: str, instance_dim: int) -> Prompts:
    shards, longest = recipe.shards, recipe.shards.max_tokens
    if rows is None:
        return Prompts(None, None, None, longest, None, source, exact=False)
    sample = sample_bytes(longest, shards.history_length, instance_dim)
    return Prompts(
        rows,
        -(-rows // shards.samples_per_shard),
        rows * longest,
        longest,
        rows * sample,
        source,
        exact=False,
    )


def sample_bytes(tokens: int, history: int, instance_dim: int) -> int:
    """Most bytes of a prompt in a tar: three members, each with a header and padded to a block."""
    members = (
        _ARRAY_HEADER + 4 * instance_dim,
        _SAMPLE_BYTES + _EVENT_BYTES * history,
        _ARRAY_HEADER + 3 * 4 * tokens,
    )
    return _MEMBERS * _BLOCK + sum(-(-size // _BLOCK) * _BLOCK for size in members)


def _split_sizes(recipe: Recipe, work: WorkDir) -> tuple[dict[str, int], str]:
    """Samples of every split where they are known, and from where."""
    manifest = work.manifest("tables")
    if manifest is not None and manifest.recipe["data"] == recipe.model_dump(mode="json")["data"]:
        counts = np.bincount(read_splits(work.stage_dir("tables")), minlength=len(schema.SPLITS))
        return dict(zip(schema.SPLITS, counts.tolist(), strict=True)), "committed tables"
    releases = RELEASES.get(recipe.data.dataset, ())
    one_release = len(releases) == 1 and recipe.data.dataset != "movielens-latest"
    if not one_release or not follows_published_rules(recipe.data):
        return {}, "unknown before `rellax tables`"
    (release,) = releases
    counts_of = dict(release.counts)
    if "valid" not in counts_of and "train_and_valid" in counts_of:
        both, (train, valid, _) = counts_of["train_and_valid"], recipe.data.split
        counts_of["valid"] = int(valid / (train + valid) * both + 1e-9)
    known = {split: counts_of[split] for split in schema.SPLITS if split in counts_of}
    return known, f"published size of {release.title}"

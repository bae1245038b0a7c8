"""One rank of `benchmarks.zero_memory`: builds the recipe's model in the engine of stage 6, trains
on made-up prompts of one length, and writes down what it holds.

Weights are counted by storage, so that a whole parameter which is only a view of its shard counts
once. The high-water mark of resident memory is reset when the model stands, because loading has a
peak of its own. What the libraries take is what is left of resident memory, after one step on short
prompts, when everything counted is taken off.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from rellax_ds import runtime
from rellax_ds.batch import Batch
from rellax_ds.config import load_recipe
from rellax_ds.engine.ds_config import resolve_ds_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rellax_ds.config import Recipe
    from rellax_ds.engine.engine import Engine

SHORT = 16
YES, NO = 7, 8


@dataclass(frozen=True)
class Held:
    """What one rank holds between two steps, and at most; bytes.

    Attributes:
        weights: Shards of all parameters and what stays whole.
        adam: Moments, and float32 weights beside the weights.
        gradients: The buffer gradients are accumulated in.
        peak: Most resident during a step, above the libraries.
        libraries: Resident beside what is counted.
    """

    weights: int
    adam: int
    gradients: int
    peak: int
    libraries: int


def main(recipe_path: str, tokens: int, output: Path) -> None:
    """Measure and write `output`, on every rank its own."""
    from rellax_ds.engine.engine import Engine
    from rellax_ds.engine.processes import start_processes
    from rellax_ds.stages.train import make_model

    recipe = load_recipe(recipe_path)
    processes = start_processes()

    widths = {"item_width": recipe.crm.embedding_dim, "instance_width": recipe.crm.hidden_dim}
    stream: Any = SimpleNamespace(index=SimpleNamespace(answer_ids=(YES, NO), **widths))
    resolved = resolve_ds_config(recipe.train, processes.world_size)
    engine = Engine(lambda: make_model(recipe, stream), recipe.train, resolved, processes)
    take_step(engine, made_batch(recipe, SHORT))
    runtime.release_memory()
    libraries = resident("VmRSS") - sum(measure(engine))
    Path("/proc/self/clear_refs").write_text("5")
    take_step(engine, made_batch(recipe, tokens))
    found = Held(*measure(engine), resident("VmHWM") - libraries, libraries)
    output.write_text(json.dumps(asdict(found)))
    processes.barrier()
    engine.close()
    processes.close()


def take_step(engine: Engine, batch: Batch) -> None:
    """One optimiser step, every micro-batch the same."""
    for number in range(engine.num_accumulated):
        engine.accumulate(batch, "memory", number)


def measure(engine: Engine) -> tuple[int, int, int]:
    """Bytes of weights, Adam state and accumulated gradients."""
    optimizer = engine.deepspeed.optimizer
    weights = [p.ds_tensor for p in engine.model.parameters()]
    weights += [p.data for p in engine.model.parameters()]
    masters = list(optimizer.fp32_partitioned_groups_flat)
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    known = storages(weights)
    beside = {key: size for key, size in storages([*masters, *moments]).items() if key not in known}
    return (
        sum(known.values()),
        sum(beside.values()),
        sum(storages([optimizer.grad_partitions_flat_buffer]).values()),
    )


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by distinct storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def made_batch(recipe: Recipe, tokens: int) -> Batch:
    """A micro-batch of prompts of `tokens` tokens, with the recipe's slots and answers."""
    rows, items = recipe.train.micro_batch, recipe.shards.history_length + 1
    answers = items if recipe.train.history_weight else 1
    places = torch.linspace(1, tokens - 1, items).long()
    starts = torch.arange(rows)[:, None] * tokens
    torch.manual_seed(0)
    weights = torch.full((rows, answers), recipe.train.history_weight)
    weights[:, -1] = 1.0
    weights /= weights.sum(1, keepdim=True)
    return Batch(
        sample_ids=torch.arange(rows),
        users=torch.arange(rows),
        input_ids=torch.randint(20, 60, (rows * tokens,)),
        lengths=torch.full((rows,), tokens),
        question_starts=torch.zeros(rows, dtype=torch.int64),
        slot_positions=(starts + places).flatten(),
        slot_vectors=torch.randn(rows * items, recipe.crm.embedding_dim),
        instance=torch.randn(rows, recipe.crm.hidden_dim),
        crm_logits=torch.zeros(rows),
        answer_positions=(starts + places[-answers:]).flatten(),
        answer_labels=torch.randint(0, 2, (rows * answers,)).float(),
        answer_weights=weights.flatten(),
        target_index=torch.arange(1, rows + 1) * answers - 1,
    )


def resident(field: str) -> int:
    """A memory figure of this process, in bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    runtime.prepare()
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

"""Tokens a second of a training step before and after length buckets and padding-free packing.

The prompts, micro-batches and adapters are the recipe's own (stages 1, 4 and 5 are run, or skipped
where their artefacts are in the work folder). Four arms: padded or packed rows, in the epoch's own
order or cut by length inside a window of steps, which is the order stage 6 takes. Arms take turns
step by step in one process with a model for each layout. Tokens are those of the prompts, without
padding. `FIGURE packing_speedup` is packed and bucketed over padded and unbucketed.
The gate: losses and gradients of a packed, a padded and a one-by-one batch agree.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks import train_step_arms as arms
from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.shards.collate import Collator
from rellax_ds.shards.order import epoch_order, step_batches

if TYPE_CHECKING:
    from rellax_ds.batch import Batch
    from rellax_ds.config import Recipe
    from rellax_ds.model.rellax import ReLLaX

BEFORE, AFTER = "padded", "packed, buckets"
ARMS = {
    BEFORE: (False, False),
    "padded, buckets": (False, True),
    "packed": (True, False),
    AFTER: (True, True),
}
"""Name to (packed, bucketed)."""

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def main() -> int:
    """Measure and print; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="ml100k_base")
    arguments.add_argument("--work-dir", type=Path, help="default: the recipe's own")
    arguments.add_argument("--steps", type=int, default=8, help="timed steps of every arm")
    arguments.add_argument("--threads", type=int, help="default: cores over the recipe's ranks")
    options = arguments.parse_args()
    runtime.prepare()
    setting = arms.prepare(options.recipe, options.work_dir, options.steps, options.threads)
    recipe, threads = setting.recipe, setting.threads
    torch.set_num_threads(threads)
    prompts = arms.Prompts(setting)
    models = {packed: model_of(recipe, prompts, packed) for packed in (False, True)}
    page = Report("packing")
    check(page, models, Collator(prompts.index), prompts)
    describe(page, measure(recipe, prompts, models, options.steps), recipe, threads)
    return page.finish(options.report)


def model_of(recipe: Recipe, prompts: arms.Prompts, packed: bool) -> ReLLaX:
    """The recipe's model with one layout of its batches."""
    config = recipe.model.model_copy(update={"packing": packed})
    return arms.resident(arms.ours(recipe.model_copy(update={"model": config}), prompts))


def check(
    page: Report, models: dict[bool, ReLLaX], collate: Collator, prompts: arms.Prompts
) -> None:
    """The correctness gate, without dropout, with B away from zero."""
    samples = prompts.step(0, slots=True)[0]
    whole, singles = collate(samples), [collate([sample]) for sample in samples]
    found = []
    for packed, batches in ((False, [whole]), (True, [whole]), (True, singles)):
        model = models[packed].eval()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
        with torch.no_grad():
            for name, parameter in trained.items():
                if ".lora_B." in name:
                    parameter.normal_(std=0.02)
        loss = 0.0
        for batch in batches:
            part = model(**batch.tensors())[0] / len(batches)
            part.backward()
            loss += float(part.detach())
        found.append((loss, {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}))
        model.zero_grad()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(kept[name])
    (_, expected), one_by_one = found[2], found[2][0]
    for name, (loss, gradients) in zip(("padded", "packed"), found, strict=False):
        worst = max(
            float((gradients[n] - g).norm() / g.norm().clamp_min(1e-12))
            for n, g in expected.items()
        )
        page.check(abs(loss - one_by_one) <= LOSS_TOLERANCE, f"{name}: loss {loss - one_by_one}")
        page.check(worst <= GRADIENT_TOLERANCE, f"{name}: a gradient differs by {worst:.1e}")
        page.body.append(
            f"Gate, {name} against one by one: losses differ by {abs(loss - one_by_one):.1e}, "
            f"gradients by at most {worst:.1e} of their norm."
        )


def measure(
    recipe: Recipe, prompts: arms.Prompts, models: dict[bool, ReLLaX], steps: int
) -> dict[str, list[tuple[int, int, float]]]:
    """Tokens, computed positions and seconds of every step of every arm."""
    collate = Collator(prompts.index, recipe.train.history_weight)
    batches = {
        name: [
            [collate([prompts.reader[p] for p in positions]) for positions in step]
            for step in cuts(recipe, prompts, bucketed, steps)
        ]
        for name, (_, bucketed) in ARMS.items()
    }
    found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in ARMS}
    names = list(ARMS)
    for step in range(-1, steps):  # the first round warms up
        for name in names[step % 4 :] + names[: step % 4]:
            packed, _ = ARMS[name]
            model, work = models[packed].train(), batches[name][max(step, 0)]
            start = time.perf_counter()
            for batch in work:
                loss, _ = model(**batch.tensors())
                (loss / len(work)).backward()
            model.zero_grad()
            seconds = time.perf_counter() - start
            if step >= 0:
                tokens = sum(batch.num_tokens for batch in work)
                found[name].append((tokens, sum(positions(b, packed) for b in work), seconds))
    return found


def cuts(
    recipe: Recipe, prompts: arms.Prompts, bucketed: bool, steps: int
) -> list[list[list[int]]]:
    """Micro-batches of sample positions of the first `steps` steps; the same samples in each
    whole window whether bucketed or not.
    """
    train, reader = recipe.train, prompts.reader
    if bucketed:
        return [
            step_batches(reader, recipe.seed, 0, step, train.global_batch, train.micro_batch, 0, 1)
            for step in range(steps)
        ]
    order = epoch_order(len(reader), recipe.seed, 0, 0, steps * train.global_batch)
    shape = (steps, train.global_batch // train.micro_batch, train.micro_batch)
    cut: list[list[list[int]]] = order.reshape(shape).tolist()
    return cut


def positions(batch: Batch, packed: bool) -> int:
    """Positions the frozen layers compute."""
    return batch.num_tokens if packed else batch.size * int(batch.lengths.max())


def describe(
    page: Report, found: dict[str, list[tuple[int, int, float]]], recipe: Recipe, threads: int
) -> None:
    """Table and figures."""
    rates = {}
    rows = []
    for name, steps in found.items():
        tokens, computed, seconds = (np.array(column) for column in zip(*steps, strict=True))
        rates[name] = float(tokens.sum() / seconds.sum())
        medians = statistics.median((tokens / seconds).tolist())
        rows.append([name, rates[name], medians, 1 - tokens.sum() / computed.sum()])
    for row in rows:
        row.append(float(row[1]) / rates[BEFORE])
    page.table(["arm", "tokens/s", "median of steps", "padding share", "times before"], rows)
    page.body.append(
        f"Recipe {recipe.name}: micro-batches of {recipe.train.micro_batch}, {threads} thread(s); "
        "forward and backward of the recipe's model, without the optimiser."
    )
    page.figures["packing_speedup"] = rates[AFTER] / rates[BEFORE]


if __name__ == "__main__":
    sys.exit(main())

"""Tokens a second of a whole training step: ours against Hugging Face Trainer with PEFT's LoRA.

The prompts are the recipe's own: stages 1, 4 and 5 are run, or skipped where their artefacts are
in the work folder. All arms (see `train_step_arms`) train the same samples in the same
micro-batches in float32 with AdamW and the same threads, by default as many as a rank of the recipe
has on this machine. Each has a process of its own, and they take turns step by step. A step is
everything between two steps: forward, backward, clipping, optimiser and the next batch. Tokens are
the words of the prompts: no padding, and no soft-token slots, which only arms with SPA compute.
Peak memory is the process's resident high-water mark. The figures are of `rellax_zero3`, stage 6 as
it is; the other arms show where the gain comes from. The gate, in
evaluation mode with equal A and B (B random): Trainer's loss and ours with M = I and the whole
vocabulary, and every gradient.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import train_step_arms as arms
from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.shards.collate import Collator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.train_step_arms import Outcome, Prompts, Setting

WARM_UP = 2
BASELINE, OURS = "trainer", "rellax_zero3"
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
MEGABYTE = 2**20


@dataclass(frozen=True)
class Timing:
    """One arm's steps after the warm-up.

    Attributes:
        seconds: Wall time of every step.
        rates: Words a second of every step.
        outcome: What the arm said at its end.
    """

    seconds: list[float]
    rates: list[float]
    outcome: Outcome


def main() -> int:
    """Measure and print; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="ml100k_base")
    arguments.add_argument("--work-dir", type=Path, help="default: the recipe's own")
    arguments.add_argument("--steps", type=int, default=5, help="timed steps of every arm")
    arguments.add_argument("--threads", type=int, help="default: cores over the recipe's ranks")
    arguments.add_argument("--arms", nargs="+", default=list(arms.ARMS), choices=arms.ARMS)
    options = arguments.parse_args()
    runtime.prepare()
    steps = WARM_UP + options.steps
    setting = arms.prepare(options.recipe, options.work_dir, steps, options.threads)
    page = Report("train step")
    check(page, setting)
    gc.collect()
    timings = measure(options.arms, setting)
    describe(page, setting, timings)
    return page.finish(options.report)


def check(page: Report, setting: Setting) -> None:
    """The correctness gate: one micro-batch through both implementations."""
    loss, worst = differences(setting)
    page.check(loss <= LOSS_TOLERANCE, f"losses differ by {loss:.2e}")
    page.check(worst <= GRADIENT_TOLERANCE, f"a gradient differs by {worst:.2e} of its norm")
    page.body.append(
        f"Gate: losses of `trainer` and `lora` differ by {loss:.1e}, gradients of A and B by at "
        f"most {worst:.1e} of their norm."
    )


def differences(setting: Setting, factor: float = 1.0) -> tuple[float, float]:
    """Of Trainer's arms and ours on the first micro-batch: losses, and the worst gradient.

    Args:
        setting: The setting.
        factor: What our B is multiplied by; other than 1 for a gate that must fail.
    """
    prompts = arms.Prompts(setting)
    samples = prompts.step(0, slots=False)[0]
    stock = arms.peft_lora(setting.recipe).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    batch = arms.stock_collator(setting.recipe)(
        [arms.features(sample, prompts.answer(sample)) for sample in samples]
    )
    loss = stock(**batch).loss
    loss.backward()
    expected = loss.detach()
    with torch.no_grad():
        short = arms.answer_loss(stock, batch, len(samples))
    gradients = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}

    recipe = arms.without_conditions(setting.recipe)
    train = recipe.train.model_copy(update={"loss": "vocabulary"})
    model = arms.ours(recipe.model_copy(update={"train": train}), prompts).eval()
    factors = {
        name: parameter for name, parameter in model.llm.named_parameters() if name in gradients
    }
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name in factors:
                factors[name].copy_(parameter * (factor if ".lora_B." in name else 1.0))
    loss, _ = model(**Collator(prompts.index)(samples).tensors())
    loss.backward()
    worst = max(
        float((factors[name].grad - gradient).norm() / gradient.norm())
        for name, gradient in gradients.items()
    )
    return max(abs(float(other - expected)) for other in (loss.detach(), short)), worst


def measure(names: Sequence[str], setting: Setting) -> dict[str, Timing]:
    """All arms, in turns; each step of an arm is timed between its turn and its next wait."""
    words = words_of(arms.Prompts(setting), setting.steps)
    context = multiprocessing.get_context("spawn")
    links, workers = {}, {}
    for name in names:
        links[name], theirs = context.Pipe()
        workers[name] = context.Process(target=arms.run, args=(name, setting, theirs), daemon=True)
        workers[name].start()
        theirs.close()
        links[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(setting.steps):
        for name in names if step % 2 else names[::-1]:
            start = time.perf_counter()
            links[name].send(None)
            links[name].recv()
            seconds[name].append(time.perf_counter() - start)
    found = {}
    for name in names:
        links[name].send(None)
        rates = [w / s for w, s in zip(words, seconds[name], strict=True)]
        found[name] = Timing(seconds[name][WARM_UP:], rates[WARM_UP:], links[name].recv())
        workers[name].join()
    return found


def words_of(prompts: Prompts, steps: int) -> list[int]:
    """Words of every step."""
    return [prompts.words(step) for step in range(steps)]


def describe(page: Report, setting: Setting, timings: dict[str, Timing]) -> None:
    """Table and figures."""
    rows = []
    for name, timing in timings.items():
        outcome = timing.outcome
        busy = [
            cpu / (wall * setting.threads)
            for cpu, wall in zip(outcome.busy[WARM_UP:], timing.seconds, strict=True)
        ]
        rows.append(
            [
                name,
                statistics.median(timing.seconds),
                statistics.median(timing.rates),
                f"{min(timing.rates):.0f} to {max(timing.rates):.0f}",
                speedup(timings, name) if BASELINE in timings else "",
                round(outcome.peak / MEGABYTE),
                round((outcome.peak - outcome.loaded) / MEGABYTE),
                statistics.median(busy),
                outcome.loss,
            ]
        )
    page.table(
        [
            *("arm", "s a step", "tokens/s", "range", "times trainer"),
            *("peak MiB", "above the loaded model", "CPU share", "mean loss"),
        ],
        rows,
    )
    train = setting.recipe.train
    page.body.append(
        f"Recipe {setting.recipe.name}: {train.global_batch} samples a step in micro-batches of "
        f"{train.micro_batch}, {setting.threads} threads, {setting.steps - WARM_UP} timed steps "
        "of each arm in turns; `times trainer` is the median over steps of the same samples. The "
        "losses of the Trainer are over the vocabulary, ours are the recipe's. The `_torch` arms "
        "leave the frozen layers to torch's own products: what a CPU of Intel's gets."
    )
    if BASELINE in timings and OURS in timings:
        base, ours = timings[BASELINE].outcome, timings[OURS].outcome
        page.figures["train_step_speedup"] = speedup(timings, OURS)
        page.figures["train_step_peak_memory_ratio"] = ours.peak / base.peak


def speedup(timings: dict[str, Timing], name: str) -> float:
    """How many times as fast as the baseline, over steps of the same samples."""
    pairs = zip(timings[BASELINE].seconds, timings[name].seconds, strict=True)
    return statistics.median(base / ours for base, ours in pairs)


if __name__ == "__main__":
    sys.exit(main())

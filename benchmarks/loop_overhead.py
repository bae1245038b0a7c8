"""What our loop costs beside the bare one: the same engine, the same batches, in turns.

`bare` is what a loop with DeepSpeed cannot do without: forward, backward and step over batches made
beforehand. `loop` is stage 6's own step with all it does around them: batches from the shards,
seeds, the agreement to stop, the schedule, the sum over ranks, figures, JSONL and progress. With
`--wandb`, `loop_wandb` also copies to wandb, offline. One process with the threads of a rank, real
model, every step taken by each arm in alternating order.

`loop_overhead` is taken within one and the same step of `loop`: all its time over the time inside
DeepSpeed's forward, backward and step, the median over steps. `loop_over_bare` is the median of the
ratios of the two arms' wall times within steps, `loop_over_bare_cpu` the same in CPU seconds; they
would also show a loop that slows DeepSpeed's own calls down, but scatter by tens of percent when
other processes share the cores: read them with their range, on a quiet machine.

The gate: the loop met the batches that bare was given, and its log has every step once.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.one_rank import made_shards, open_engine
from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.config import load_recipe
from rellax_ds.engine.checkpoint import CheckpointStore
from rellax_ds.training.loop import Loop, LoopState
from rellax_ds.training.signals import StopRequest
from rellax_ds.training.sinks import JsonlSink, Sinks
from rellax_ds.training.stream import PromptStream
from rellax_ds.training.wandb_sink import WandbSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rellax_ds.batch import Batch
    from rellax_ds.config import Recipe


class Recording(PromptStream):
    """A stream that remembers which samples it handed out."""

    seen: list[int]

    def micro_batches(self, step: int) -> Iterator[tuple[int, Batch]]:
        """The stream's own, noted."""
        for number, batch in super().micro_batches(step):
            self.seen += batch.sample_ids.tolist()
            yield number, batch


class Timed:
    """DeepSpeed's engine with the time spent in its forward, backward and step added up.

    Attributes:
        seconds: The sum so far.
    """

    def __init__(self, engine: Any) -> None:
        """Stand in front of `engine`."""
        self._engine, self.seconds = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self._engine, name)

    def __call__(self, **tensors: Any) -> Any:
        """Forward."""
        return self._add(lambda: self._engine(**tensors))

    def backward(self, loss: Any) -> None:
        """Backward."""
        self._add(lambda: self._engine.backward(loss))

    def step(self) -> None:
        """The optimiser's step, when one is due."""
        self._add(self._engine.step)

    def _add(self, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - start
        return result


@dataclass(frozen=True)
class Took:
    """One step of one arm: wall seconds, CPU seconds, and wall seconds inside DeepSpeed."""

    wall: float
    cpu: float
    inside: float


class Arms:
    """Ways to take the same step on one engine.

    Attributes:
        stream: The stream of the loops.
        log: The log of arm `loop`.
        steps: Arm to the function that takes a step.
        batches: What `bare` is given.
    """

    def __init__(self, recipe: Recipe, shards: Path, folder: Path, wandb: bool) -> None:
        """Build the engine and an own loop for every arm that has one."""
        self.recipe = recipe
        self.stream = Recording(shards, recipe, 0, 1)
        self.stream.seen = []
        threads = max(runtime.num_cpus() // recipe.train.num_processes, 1)
        self.engine = open_engine(recipe, self.stream, threads)
        self.engine.deepspeed = Timed(self.engine.deepspeed)
        self.log = folder / "loop.jsonl"
        self.steps: dict[str, Callable[[int], None]] = {"bare": self._bare}
        self._closing = contextlib.ExitStack()
        rows = recipe.train.epochs * self.stream.steps_per_epoch * recipe.train.global_batch
        self._progress = self._closing.enter_context(runtime.Progress("loop", rows, "samples"))
        self._loop("loop", folder, None)
        if wandb:
            choice = recipe.train.model_copy(update={"wandb": "offline"})
            copied = recipe.model_copy(update={"train": choice})
            self._loop("loop_wandb", folder, WandbSink(copied, folder, "loop_overhead"))

    def prepare(self, step: int) -> None:
        """Make the batches that `bare` will be given."""
        self.batches = [batch for _, batch in PromptStream.micro_batches(self.stream, step)]

    def take(self, name: str, step: int) -> Took:
        """Take a step with an arm."""
        inside, wall, cpu = self.engine.deepspeed.seconds, time.perf_counter(), time.process_time()
        self.steps[name](step)
        return Took(
            time.perf_counter() - wall,
            time.process_time() - cpu,
            self.engine.deepspeed.seconds - inside,
        )

    def close(self) -> None:
        """Close sinks, progress and the engine."""
        self._closing.close()
        self.stream.close()
        self.engine.close()

    def _bare(self, _step: int) -> None:
        engine = self.engine.deepspeed
        self.engine.model.train()
        for batch in self.batches:
            loss, _ = engine(**batch.tensors())
            engine.backward(loss)
            engine.step()

    def _loop(self, name: str, folder: Path, wandb: WandbSink | None) -> None:
        processes = self.engine.processes
        stop = self._closing.enter_context(StopRequest(processes, folder / "STOP"))
        store = CheckpointStore(folder / name, processes, keep_last=2)
        sinks = Sinks(JsonlSink(folder / f"{name}.jsonl"), wandb=wandb)
        self._closing.callback(sinks.close)
        parts = (self.engine, self.stream, self.recipe, store, sinks, stop, folder)
        loop = Loop(*parts, LoopState())

        def advance(step: int) -> None:
            loop.state.step = step
            loop.advance(self._progress)

        self.steps[name] = advance


def main() -> int:
    """Measure and print; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="ml100k_base")
    arguments.add_argument("--work-dir", type=Path, help="default: the recipe's own")
    arguments.add_argument("--steps", type=int, default=10, help="timed steps of every arm")
    arguments.add_argument("--wandb", action="store_true", help="also time the copy to wandb")
    options = arguments.parse_args()
    runtime.prepare()
    recipe = load_recipe(options.recipe)
    shards = made_shards(recipe, options.work_dir)
    page = Report("loop overhead")
    with tempfile.TemporaryDirectory(prefix="rellax-loop-") as folder:
        arms = Arms(recipe, shards, Path(folder), options.wandb)
        measure(page, arms, options.steps)
        arms.close()
    return page.finish(options.report)


def measure(page: Report, arms: Arms, steps: int) -> None:
    """Every arm takes every step; the first one warms up."""
    taken: dict[str, list[Took]] = {name: [] for name in arms.steps}
    given: list[int] = []
    for step in range(steps + 1):
        arms.prepare(step)
        names = list(arms.steps) if step % 2 else list(arms.steps)[::-1]
        for name in names:
            took = arms.take(name, step)
            if step:
                taken[name].append(took)
            if name != "bare":
                given += [int(n) for batch in arms.batches for n in batch.sample_ids]
    page.check(arms.stream.seen == given, "the loop met other batches than bare was given")
    logged = [json.loads(line)["step"] for line in arms.log.read_text().splitlines()]
    page.check(logged == list(range(1, steps + 2)), "the log does not have every step once")
    describe(page, taken)


def describe(page: Report, taken: dict[str, list[Took]]) -> None:
    """Table and figures."""
    rows = []
    for name, steps in taken.items():
        wall = within(steps, taken["bare"], "wall")
        rows.append(
            [
                name,
                statistics.median(took.wall for took in steps),
                statistics.median(wall),
                f"{min(wall):.3f} to {max(wall):.3f}",
                statistics.median(within(steps, taken["bare"], "cpu")),
                statistics.median(took.wall / took.inside for took in steps),
                1000 * statistics.median(took.wall - took.inside for took in steps),
            ]
        )
    page.table(
        [
            *("arm", "s a step", "times bare", "range", "CPU times bare"),
            *("step over its DeepSpeed calls", "ms outside them"),
        ],
        rows,
    )
    bare, loop = taken["bare"], taken["loop"]
    page.figures["loop_overhead"] = statistics.median(took.wall / took.inside for took in loop)
    page.figures["loop_over_bare"] = statistics.median(within(loop, bare, "wall"))
    page.figures["loop_over_bare_cpu"] = statistics.median(within(loop, bare, "cpu"))
    if "loop_wandb" in taken:
        copied = taken["loop_wandb"]
        page.figures["wandb_overhead"] = statistics.median(t.wall / t.inside for t in copied)
        page.figures["wandb_over_loop_cpu"] = statistics.median(within(copied, loop, "cpu"))


def within(above: list[Took], below: list[Took], what: str) -> list[float]:
    """Ratios within steps."""
    return [getattr(a, what) / getattr(b, what) for a, b in zip(above, below, strict=True)]


if __name__ == "__main__":
    sys.exit(main())

"""What ZeRO-3 leaves on a rank: one and two real ranks on the CPU, beside what `rellax plan` says.

The model is the recipe's, by default SmolLM2-135M with CFLoRA and SPA; the prompts are made up and
of one length, so that the plan knows a micro-batch's tokens. The gate: weights, Adam state and
accumulated gradients of every rank within 15 % of the plan's terms, and peak memory above the
libraries within 15 % of its total. Each rank is a process of one thread, in which malloc hands
large blocks back, so that resident memory is memory in use.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Report, parser
from benchmarks.zero_memory_rank import Held
from rellax_ds import runtime
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import load_recipe
from rellax_ds.planning.estimate import Machines, make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rellax_ds.config import Recipe
    from rellax_ds.planning.estimate import Plan

RANKS = (1, 2)
TOLERANCE = 0.15
TARGET = 0.55
MIB = 2**20
_RETURNED = str(256 * 1024)
_POLL_SECONDS = 0.2


def main() -> int:
    """Measure and print; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="ml100k_base")
    arguments.add_argument("--tokens", type=int, default=64, help="length of every prompt")
    arguments.add_argument("--timeout", type=float, default=280, help="seconds of one launch")
    options = arguments.parse_args()
    runtime.prepare()
    page = Report("zero memory")
    recipe = load_recipe(options.recipe)
    found = {n: measure(options.recipe, options.tokens, n, options.timeout) for n in RANKS}
    describe(page, recipe, options.tokens, found)
    return page.finish(options.report)


def measure(recipe: str, tokens: int, ranks: int, timeout: float) -> list[Held]:
    """Run `ranks` ranks to their end and read what each of them held.

    Raises:
        RuntimeError: A rank failed or did not end in time; none is left behind.
    """
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        folder = Path(scratch)
        started = [start(recipe, tokens, rank, ranks, port, folder) for rank in range(ranks)]
        try:
            wait(started, timeout)
        except RuntimeError as error:
            said = "".join((folder / f"{rank}.log").read_text()[-1500:] for rank in range(ranks))
            raise RuntimeError(f"{error}: {said}") from None
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [Held(**json.loads((folder / f"{rank}.json").read_text())) for rank in range(ranks)]


def start(
    recipe: str, tokens: int, rank: int, ranks: int, port: str, folder: Path
) -> subprocess.Popen[bytes]:
    """Start one rank of one thread."""
    environment = runtime.rank_environment(threads=1, cuda=False) | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": _RETURNED,
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **{"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
    }
    module = "benchmarks.zero_memory_rank"
    command = [sys.executable, "-m", module, recipe, str(tokens), str(folder / f"{rank}.json")]
    with (folder / f"{rank}.log").open("wb") as log:
        root = Path(__file__).resolve().parents[1]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=root)


def wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> None:
    """Wait for all; the first failure ends the waiting, since the others would wait for it.

    Raises:
        RuntimeError: One failed, or the time is over.
    """
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"the ranks did not end within {timeout:g} s")
        time.sleep(_POLL_SECONDS)
    if any(process.poll() for process in processes):
        raise RuntimeError("a rank failed")


def planned(recipe: Recipe, tokens: int, ranks: int) -> dict[str, int]:
    """The plan's figures for what `Held` measures, bytes of a rank."""
    shards = recipe.shards.model_copy(update={"max_tokens": tokens})
    train = recipe.train.model_copy(update={"eval_batch": 1})
    made = make_plan(
        recipe.model_copy(update={"shards": shards, "train": train}),
        WorkDir(Path("no such folder")),
        Machines(ranks=ranks),
    )
    weights = ("frozen weights", "trained weights", "persistent weights")
    trained = [weight for weight in made.shape.weights if weight.trained]
    element = 2 if made.precision == "bf16" else 4
    return {
        "weights": sum(_term(made, name) for name in weights),
        "adam": _term(made, "Adam state"),
        "gradients": sum(-(-weight.numel // ranks) for weight in trained) * element,
        "peak": made.total.device - _term(made, "CUDA and NCCL"),
    }


def describe(page: Report, recipe: Recipe, tokens: int, found: dict[int, list[Held]]) -> None:
    """Gate, table and figures."""
    rows: list[Sequence[object]] = []
    for ranks, held_by in found.items():
        wanted = planned(recipe, tokens, ranks)
        for rank, held in enumerate(held_by):
            for name, figure in wanted.items():
                measured = getattr(held, name)
                off = measured / figure - 1
                where = f"{name}, rank {rank} of {ranks}"
                page.check(
                    abs(off) <= TOLERANCE,
                    f"{where}: {measured / MIB:.1f} MiB, the plan says {figure / MIB:.1f} "
                    f"({off:+.1%})",
                )
                rows.append([where, measured / MIB, figure / MIB, f"{off:+.1%}"])
            rows.append([f"libraries, rank {rank} of {ranks}", held.libraries / MIB, "", ""])
    page.table(["what", "measured MiB", "planned MiB", "off"], rows)
    page.body.append(
        f"Recipe {recipe.name}: {recipe.model.backbone}, micro-batches of "
        f"{recipe.train.micro_batch} prompts of {tokens} tokens, {recipe.train.precision}, "
        f"{recipe.train.ds_config}. Peak is the resident high-water mark of a step above the "
        "libraries; the plan's is the sum of its terms."
    )
    one, many = (max(held.weights for held in found[n]) for n in (RANKS[0], RANKS[-1]))
    share = many / one
    page.check(share <= TARGET, f"a rank of two holds {share:.3f} of one rank's weights")
    page.figures["zero3_weight_share"] = share
    worst = max(held.peak for held in found[RANKS[-1]])
    page.figures["zero3_peak_share"] = worst / max(held.peak for held in found[RANKS[0]])


def _term(plan: Plan, name: str) -> int:
    return sum(term.device for term in plan.terms if term.name == name)


if __name__ == "__main__":
    sys.exit(main())

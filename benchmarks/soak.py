"""A training killed again and again, at random moments, and resumed by the same command each time.

A tiny run is trained once undisturbed and once under SIGKILL: of a rank, of DeepSpeed's inner
launcher or of the command itself, during the start, between steps and in the middle of a save. A
kill is survived when the next start continues from the newest checkpoint that was published before
it. In the end the log must hold every step once, with the undisturbed run's figures, and the
adapter must equal the undisturbed run's to the bit.

With one rank a start is forked from this process, which has imported what the command imports: that
is most of a start, and 50 of them fit into minutes. With more the whole command is started anew.

Figures end the output, one a line: FIGURE name value.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.artifacts import WorkDir
from rellax_ds.training.throughput import FIELDS

ROOT = Path(__file__).resolve().parent.parent
STEPS_PER_EPOCH = 6
STEPS_PER_KILL = 4
LIMIT = 300.0
POLL = 0.01
MOMENTS = ("start", "step", "step", "save", "save")
"""What a kill is aimed at; steps and saves are the more frequent."""


@dataclass
class Soak:
    """One training under kills.

    Attributes:
        work: Its run folder; stages 1 to 5 are committed.
        recipe: The recipe.
        ranks: Ranks of every start.
        random: Chooses moments and victims.
        page: Takes the checks.
        rows: Moment, victim, newest step before the kill, where the next start continued, survived.
    """

    work: WorkDir
    recipe: Path
    ranks: int
    random: random.Random
    page: Report
    rows: list[list[object]] = field(default_factory=list)
    attempt: int = 0

    def start(self) -> subprocess.Popen[bytes] | Forked:
        """Start the command in a session of its own, its output in a file of its own."""
        self.attempt += 1
        flags = ["--recipe", str(self.recipe), "--work-dir", str(self.work.root)]
        flags += ["--set", f"train.num_processes={self.ranks}"]
        if self.ranks == 1:
            return Forked(["rellax", "train", *flags], self.output)
        environment = runtime.child_environment(
            {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        )
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *flags],
                cwd=self.recipe.parent,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> Path:
        """What the latest start said."""
        return self.work.root / f"output-{self.attempt}"

    def published(self) -> int:
        """Step of the newest published checkpoint; 0 without one."""
        found = self.work.root.glob(".running/6_train-*/checkpoints/step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def finish(self) -> None:
        """Run to the end, undisturbed."""
        process = self.start()
        self._note_resume(process)
        status = process.wait(timeout=LIMIT)
        self.page.check(status == 0, f"exit status {status}: {self.said()}")

    def said(self) -> str:
        """End of what the latest start said."""
        return self.output.read_text(errors="replace")[-600:]

    def kill(self) -> bool:
        """Start, kill at a random moment; False when the training ended before."""
        moment, delay = self.random.choice(MOMENTS), self.random.random()
        more, before = self.random.randrange(3), self.published()
        process = self.start()
        self._note_resume(process)
        deadline = time.monotonic() + LIMIT
        if moment == "start":
            time.sleep((2 if self.ranks == 1 else 8) * delay)
        while moment != "start" and process.poll() is None and time.monotonic() < deadline:
            staged = any(self.work.root.glob(".running/6_train-*/checkpoints/.staging-*/*"))
            if self.published() > before + more and (moment == "step" or staged):
                break
            time.sleep(POLL)
        time.sleep(delay * (0.3 if moment == "step" else 0.01))
        newest, victim = self.published(), self._strike(process)
        if victim is None:
            return False
        self.rows.append([moment, victim, newest, "", "yes"])
        return True

    def _strike(self, process: subprocess.Popen[bytes] | Forked) -> str | None:
        """SIGKILL a victim and wait until nothing of this start is left."""
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        family += [child for p in family for child in p.children(recursive=True)]
        if not family:
            return None
        ranks = [p for p in family if _runs(p, "rellax_ds.cli") and not _runs(p, "launch")]
        launchers = [p for p in family if _runs(p, "deepspeed.launcher.launch")]
        victims = {"command": family[:1], "rank": ranks, "inner launcher": launchers}
        name = self.random.choice([name for name, found in victims.items() if found])
        self.random.choice(victims[name]).kill()
        process.wait(timeout=LIMIT)
        _, left = psutil.wait_procs(family, timeout=40)
        self.page.check(not left, f"processes outlive a killed {name}: {left}")
        for straggler in left:
            straggler.kill()
        return name

    def _note_resume(self, process: subprocess.Popen[bytes] | Forked) -> None:
        """Wait until the start after a kill says where it continues, and judge that kill."""
        if not self.rows or self.rows[-1][2] == 0:
            return
        row, found, deadline = self.rows[-1], None, time.monotonic() + LIMIT
        while found is None and process.poll() is None and time.monotonic() < deadline:
            found = re.search(r"continues from .*step-(\d+)", self.output.read_text())
            time.sleep(POLL)
        row[3] = int(found[1]) if found else "nowhere"
        survived = isinstance(row[3], int) and row[3] >= row[2]
        row[4] = "yes" if survived else "no"
        self.page.check(survived, f"kill {len(self.rows)}: {row}: {self.said()}")


class Forked:
    """A `rellax` command in a process forked from this one; as much of `Popen` as is needed."""

    def __init__(self, argv: list[str], output: Path) -> None:
        """Begin it, in a session of its own, its output in a file."""
        self._status: int | None = None
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.pid = os.fork()
        if not self.pid:
            self._run(argv, file)
        os.close(file)

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        if self._status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if found else None
        return self._status

    def wait(self, timeout: float) -> int:
        """Exit status once it has one.

        Raises:
            TimeoutError: It runs on.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} runs on")
            time.sleep(POLL)
        assert self._status is not None
        return self._status

    def _run(self, argv: list[str], file: int) -> None:
        from rellax_ds.cli import main as command

        status: Any = 1
        try:
            os.setsid()
            os.dup2(file, 1)
            os.dup2(file, 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = argv
            command()
            status = 0
        except SystemExit as left:
            status = left.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)


def warm() -> None:
    """Import what a start imports, without starting a thread or a process group."""
    runtime.prepare_engine(cuda=False)
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # torch's compiler with it
    import peft  # noqa: F401
    import transformers.integrations  # noqa: F401

    import rellax_ds.cli
    import rellax_ds.model.rellax
    import rellax_ds.stages.train  # noqa: F401


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return any(module in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def prepare(folder: Path, kills: int) -> tuple[Path, WorkDir]:
    """A recipe with enough steps for the kills, and a run folder with stages 1 to 5."""
    from rellax_ds.testing import tiny_recipe

    recipe = tiny_recipe(
        folder,
        train={
            "epochs": max(2, math.ceil(kills * STEPS_PER_KILL / STEPS_PER_EPOCH)),
            "eval_every": STEPS_PER_EPOCH,
            "checkpoint_every": 1,
        },
    )
    work = WorkDir(folder / "prepared")
    command = [sys.executable, "-m", "rellax_ds.cli", "run", "--until", "shards"]
    command += ["--recipe", str(recipe), "--work-dir", str(work.root)]
    environment = runtime.child_environment({"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return recipe, work


def figures_of(work: WorkDir) -> list[dict[str, Any]]:
    """The log's records, less the speed."""
    lines = (work.stage_dir("train") / "log.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in FIELDS}
        for line in lines
    ]


def adapter_of(work: WorkDir) -> dict[str, bytes]:
    """The adapter's tensors as they lie on the disk."""
    folder = work.stage_dir("train") / "adapter"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def compare(page: Report, calm: WorkDir, killed: WorkDir) -> None:
    """Record whether the killed run equals the undisturbed one."""
    expected, found = figures_of(calm), figures_of(killed)
    steps = [record["step"] for record in found if record["event"] == "step"]
    page.check(steps == list(range(1, len(steps) + 1)), "a step is lost or doubled in the log")
    page.check(found == expected, "the log's figures differ from the undisturbed run's")
    page.check(
        adapter_of(killed) == adapter_of(calm) != {}, "the adapter differs from the undisturbed one"
    )


def main() -> int:
    """Soak; 1 when a kill lost or changed something."""
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=50)
    arguments.add_argument("--ranks", type=int, default=1)
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    options = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is cleared
    if options.ranks == 1:
        warm()
    page = Report("soak")
    print(f"seed {options.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rellax-soak-") as name:
        recipe, prepared = prepare(Path(name), options.kills)
        works = [WorkDir(Path(name) / run) for run in ("calm", "killed")]
        for work in works:
            shutil.copytree(prepared.root, work.root)
        chance = random.Random(options.seed)
        calm, soak = (Soak(work, recipe, options.ranks, chance, page) for work in works)
        calm.finish()
        print(f"undisturbed: {time.monotonic() - start:.0f} s", flush=True)
        while len(soak.rows) < options.kills and not page.failures and soak.kill():
            print(f"{time.monotonic() - start:.0f} s: kill {len(soak.rows)}", flush=True)
        page.check(len(soak.rows) >= options.kills, f"the run ended after {len(soak.rows)} kills")
        if not page.failures:
            soak.finish()
        if not page.failures:
            compare(page, *works)
    survived = 0 if page.failures else sum(row[4] == "yes" for row in soak.rows)
    page.figures = {
        "kills_tried": len(soak.rows),
        "kills_survived": survived,
        "soak_minutes": (time.monotonic() - start) / 60,
    }
    page.body.append(f"Seed {options.seed}, {options.ranks} ranks, {os.cpu_count()} cores.")
    header = ["aimed at", "killed", "newest checkpoint", "continued from", "survived"]
    page.table(header, soak.rows)
    return page.finish(options.report)


if __name__ == "__main__":
    sys.exit(main())

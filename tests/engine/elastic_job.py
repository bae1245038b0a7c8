"""The ranks of test_elastic.py: train the engine's small model under ZeRO-2 and ZeRO-3.

    elastic_job.py FOLDER LAUNCHES

LAUNCHES is JSON: [[ranks, [[precision, stage, from or null, to, poisoned], ...]], ...]. The ranks
of a launch are forked from this process, which has imported all they need. Every task takes three
steps of four rows, from the file `from` or from the start, writes its state to the file `to`, and
groups, losses and which steps each rank saw skipped to `TO.json`. `poisoned` puts a NaN into row 1
of step 1.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from rellax_ds import runtime

runtime.prepare_engine(cuda=False)

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # slow imports, before the fork
import torch
import transformers.integrations  # noqa: F401
from engine_model import ROOT, Rows, make_model
from ranks import run_ranks

from rellax_ds.config import TrainConfig
from rellax_ds.engine import elastic
from rellax_ds.engine.ds_config import resolve_ds_config
from rellax_ds.engine.engine import Engine
from rellax_ds.engine.processes import Processes, start_processes

STEPS, ROWS = 3, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(task: list[Any], folder: Path, processes: Processes) -> None:
    precision, stage, source, target, poisoned = task
    path = ROOT / "ds_configs" / f"zero{stage}_fp32_cpu.json"
    train = TrainConfig(ds_config=path, global_batch=ROWS, micro_batch=1, precision=precision)

    def make() -> tuple[Any, Any]:
        model, groups = make_model()
        return model.to(DTYPES[precision]), groups

    engine = Engine(make, train, resolve_ds_config(train, processes.world_size), processes)
    if source is not None:
        elastic.restore(engine, folder / source)
    first = engine.deepspeed.global_steps
    losses, skipped = [], []
    for step in range(first, first + STEPS):
        engine.set_rate(0.9**step)
        loss = 0.0
        for row in range(processes.rank, ROWS, processes.world_size):
            batch: Any = Rows(step, row, DTYPES[precision])
            if poisoned and (step, row) == (1, 1):
                batch.labels = batch.labels * float("nan")
            loss += engine.accumulate(batch, "seed", step, row)
        losses.append(processes.sum([loss])[0] / ROWS)
        skipped.append(engine.outcome().skipped)
    seen = {"losses": losses, "skipped": processes.gather(skipped)}
    tensors, facts = elastic.capture(engine)
    if processes.first:
        elastic.write(folder / target, tensors, facts)
        (folder / f"{target}.json").write_text(json.dumps(facts | seen))
    processes.barrier()
    engine.close()


def run_all(tasks: list[list[Any]], folder: Path) -> None:
    processes = start_processes()
    for task in tasks:
        run(task, folder, processes)
    processes.close()


def main() -> None:
    folder = Path(sys.argv[1])
    for ranks, tasks in json.loads(sys.argv[2]):
        run_ranks(ranks, functools.partial(run_all, tasks, folder))


if __name__ == "__main__":
    main()

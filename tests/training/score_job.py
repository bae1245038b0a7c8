"""The ranks of test_score.py: score the same rows on one, two and four ranks.

    score_job.py FILE FOLDER

FILE holds users, labels and logits, one row a sample; every rank scores its share in batches, the
logits stand for a model's. Rank 0 of N writes what it found to FOLDER/N.json.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rellax_ds import runtime

runtime.prepare_engine(cuda=False)

import deepspeed  # noqa: F401  # before the ranks are forked
import numpy as np
import torch
from ranks import run_ranks

from rellax_ds.engine.processes import start_processes
from rellax_ds.shards.order import eval_batches
from rellax_ds.training.score import score_split

BATCH = 7


def score(rows: Any, folder: Path) -> None:
    processes = start_processes()
    engine: Any = SimpleNamespace(processes=processes, score=lambda batch: batch.logits)
    samples: Any = SimpleNamespace(lengths=np.arange(len(rows)) % 13)
    samples = type("Samples", (), {"__len__": lambda _: len(rows), "lengths": samples.lengths})()
    cut = eval_batches(samples, BATCH, processes.rank, processes.world_size)
    batches = [(batch(rows, positions), repeated) for positions, repeated in cut]
    found = score_split(engine, batches, len(rows), lambda: None)
    everywhere = processes.gather(found.metrics())
    if processes.first:
        paired = bool((found.crm_logits == 2 * found.logits).all())
        document = {"metrics": everywhere, "ids": found.ids.tolist(), "paired": paired}
        (folder / f"{processes.world_size}.json").write_text(json.dumps(document))
    processes.close()


def batch(rows: Any, positions: list[int]) -> Any:
    users, labels, logits = torch.from_numpy(rows[positions]).unbind(1)
    ids = torch.tensor(positions)
    return SimpleNamespace(
        size=len(positions),
        sample_ids=ids,
        users=users.long(),
        labels=labels,
        logits=logits,
        crm_logits=2 * logits,
    )


if __name__ == "__main__":
    data = np.load(sys.argv[1])
    for ranks in (1, 2, 4):
        run_ranks(ranks, functools.partial(score, data, Path(sys.argv[2])))

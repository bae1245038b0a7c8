"""A process of its own that copies a few records to the real wandb, as a training does.

Run as `python wandb_job.py MODE FOLDER PATIENCE`; prints the seconds its own calls took.
"""

import sys
import time
from pathlib import Path

from rellax_ds import runtime
from rellax_ds.config import Recipe, TrainConfig
from rellax_ds.training.wandb_sink import WandbSink

if __name__ == "__main__":
    runtime.prepare()
    mode, folder, patience = sys.argv[1:]
    recipe = Recipe(name="made", train=TrainConfig.model_validate({"wandb": mode}))
    start = time.monotonic()
    sink = WandbSink(recipe, Path(folder), "made-group", patience=float(patience))
    for step in range(1, 201):
        sink.write({"event": "step", "step": step, "loss": 1.0 / step})
    sink.keep(Path(folder) / "adapter", Path(folder) / "index.json")
    took = time.monotonic() - start
    sink.close()
    sys.stdout.write(f"{took}\n")

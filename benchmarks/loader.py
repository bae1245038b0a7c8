"""The training's loader: how far ahead of the optimiser it is, and how fast a stream is taken up.

Rate: samples/s of the loop's own stream in one process (order, `pread`, checksum, decoding,
collation), over the samples/s that real ZeRO-3 steps of the recipe's model consume on this machine
in the same run, one rank on all cores, batches made beforehand.

Seek: on an index of 10^6 samples, the seconds a fresh process takes from opening the stream to the
first micro-batch of a step in the middle; libraries are imported before. The files are real: the
first partition that stage 5 wrote, copied as often as needed, so sample ids repeat while places do
not (3.6 GB of prompts of 63 tokens in 3,907 shards, in the page cache). Checking the sha256 of all
shards is proportional to their bytes, is done by one rank, and can be left to the checksum of every
sample (`train.verify`): it is a figure of its own.

The gate: every window of an epoch reads the order's samples, each once; and the first micro-batch
after the seek is the one the order names.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from benchmarks.one_rank import made_shards, open_engine
from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.artifacts import file_sha256, write_json
from rellax_ds.config import digest, load_recipe
from rellax_ds.shards.order import WINDOW_STEPS, epoch_order, step_batches
from rellax_ds.shards.read import CRM, INDEX, SAMPLES, ShardIndex, ShardReader
from rellax_ds.tables import write_parquet
from rellax_ds.training.stream import PromptStream

if TYPE_CHECKING:
    from rellax_ds.config import Recipe

HALF_SECONDS = 4.0


def main() -> int:
    """Measure and print; 1 when the gate fails."""
    arguments = parser(__doc__)
    arguments.add_argument("--recipe", default="ml100k_base")
    arguments.add_argument("--work-dir", type=Path, help="default: the recipe's own")
    arguments.add_argument("--steps", type=int, default=4, help="timed optimiser steps")
    arguments.add_argument("--samples", type=int, default=10**6, help="samples of the large index")
    arguments.add_argument("--scratch", type=Path, help="where the large index is made")
    arguments.add_argument("--seek", nargs=2, metavar=("FOLDER", "STEP"), help="used by itself")
    options = arguments.parse_args()
    runtime.prepare()
    recipe = load_recipe(options.recipe)
    if options.seek:
        print(json.dumps(seek(Path(options.seek[0]), recipe, int(options.seek[1]))))
        return 0
    shards = made_shards(recipe, options.work_dir)
    page = Report("loader")
    rates(page, shards, recipe, options.steps)
    with tempfile.TemporaryDirectory(prefix="rellax-loader-", dir=options.scratch) as folder:
        large = Path(folder) / "5_shards"
        tile(shards, large, options.samples)
        resume(page, large, recipe, options.recipe)
    return page.finish(options.report)


def rates(page: Report, shards: Path, recipe: Recipe, steps: int) -> None:
    """Samples/s of the stream, before and after those of the training."""
    stream = PromptStream(shards, recipe, 0, 1)
    check_epoch(page, stream, ShardReader.open(shards, "train"), recipe)
    before = loading_rate(stream)
    training, waited = training_rate(stream, recipe, steps)
    after = loading_rate(stream)
    loading = (before + after) / 2
    page.table(
        ["what", "samples/s"],
        [
            ["stream, before the training", before],
            ["stream, after it", after],
            [f"optimiser steps ({steps}, one rank)", training],
        ],
    )
    page.body.append(
        f"{recipe.train.global_batch} samples a step in micro-batches of "
        f"{recipe.train.micro_batch}; making the batches of a step took {waited:.2f} % of its time."
    )
    page.figures["loader_samples_per_second"] = loading
    page.figures["training_samples_per_second"] = training
    page.figures["loader_over_training"] = loading / training
    stream.close()


def check_epoch(page: Report, stream: PromptStream, reader: ShardReader, recipe: Recipe) -> None:
    """The gate of the rate: an epoch through the stream, window by window, against the order."""
    steps, batch = stream.steps_per_epoch, recipe.train.global_batch
    for first in range(0, steps, WINDOW_STEPS):
        last = min(first + WINDOW_STEPS, steps)
        seen = [
            int(sample)
            for step in range(first, last)
            for _, made in stream.micro_batches(step)
            for sample in made.sample_ids
        ]
        positions = epoch_order(len(reader), recipe.seed, 0, first * batch, last * batch)
        page.check(
            sorted(seen) == sorted(reader.samples[positions].tolist()),
            f"steps {first} to {last} do not read the order's samples, each once",
        )


def loading_rate(stream: PromptStream) -> float:
    """Samples/s of whole steps, for a few seconds."""
    start, samples = time.perf_counter(), 0
    for step in itertools.count():
        samples += sum(batch.size for _, batch in stream.micro_batches(step))
        seconds = time.perf_counter() - start
        if seconds > HALF_SECONDS:
            return samples / seconds
    raise AssertionError("unreachable")


def training_rate(stream: PromptStream, recipe: Recipe, steps: int) -> tuple[float, float]:
    """Samples/s of `steps` optimiser steps after one for warming up, and the share of their time
    that making their batches took, in percent.
    """
    engine = open_engine(recipe, stream, runtime.num_cpus())
    busy = making = 0.0
    for step in range(steps + 1):
        begun = time.perf_counter()
        batches = list(stream.micro_batches(step))
        made = time.perf_counter()
        for number, batch in batches:
            engine.accumulate(batch, recipe.seed, step, number)
        engine.outcome()
        if step:
            making += made - begun
            busy += time.perf_counter() - made
    engine.close()
    return steps * recipe.train.global_batch / busy, 100 * making / (busy + making)


def tile(source: Path, target: Path, samples: int) -> None:
    """Copy the first training partition until there are `samples`; valid stays as it is."""
    index = ShardIndex.open(source)
    document = {key: value for key, value in index.document.items() if key != "digest"}
    first, *_ = document["shards"]["train"]
    copies = -(-samples // first["n"])
    target.mkdir(parents=True)
    content = (source / first["name"]).read_bytes()
    names = [f"train-{number:05d}.tar" for number in range(copies)]
    for name in names:
        (target / name).write_bytes(content)
    valid = document["shards"]["valid"]
    for name in (CRM, *(shard["name"] for shard in valid)):
        shutil.copy(source / name, target / name)
    rows = [index.rows("train").slice(0, first["n"])] * copies
    write_parquet(pa.concat_tables([*rows, index.rows("valid")]), target / SAMPLES)
    train = [first | {"name": name} for name in names]
    document["shards"] = {"train": train, "valid": valid, "test": []}
    path = target / SAMPLES
    document["samples"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(target / INDEX, document | {"digest": digest(document)})


def seek(folder: Path, recipe: Recipe, step: int) -> dict[str, Any]:
    """What a fresh process measures: opening, the first micro-batch, and the whole check."""
    start = time.perf_counter()
    stream = PromptStream(folder, recipe, 0, 1)
    opened = time.perf_counter()
    _, batch = next(iter(stream.micro_batches(step)))
    first = time.perf_counter()
    stream.verify()
    return {
        "open": opened - start,
        "first": first - opened,
        "verify": time.perf_counter() - first,
        "ids": batch.sample_ids.tolist(),
    }


def resume(page: Report, folder: Path, recipe: Recipe, name: str) -> None:
    """Take the large stream up in a process of its own, in the middle."""
    reader = ShardReader.open(folder, "train", verify="size")
    train = recipe.train
    step = len(reader) // train.global_batch // 2 + 1
    command = [sys.executable, "-m", "benchmarks.loader", "--recipe", name]
    command += ["--seek", str(folder), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        sys.exit(f"seek failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    (positions, *_) = step_batches(
        reader, recipe.seed, 0, step, train.global_batch, train.micro_batch, 0, 1
    )
    expected = reader.samples[np.array(positions)].tolist()
    page.check(found["ids"] == expected, f"step {step} begins with other samples than the order's")
    size = sum(shard["bytes"] for shard in reader.index.document["shards"]["train"])
    page.table(
        ["a fresh process at a step in the middle", "seconds"],
        [
            ["open index and sizes", found["open"]],
            ["first micro-batch", found["first"]],
            [f"sha256 of {size / 1e9:.2f} GB (rank 0, at every start)", found["verify"]],
        ],
    )
    shards = len(reader.index.document["shards"]["train"])
    page.body.append(f"{len(reader)} samples in {shards} shards.")
    page.figures["resume_seek_seconds"] = found["open"] + found["first"]
    page.figures["resume_verify_seconds"] = found["verify"]
    page.figures["resume_verify_gigabytes_per_second"] = size / 1e9 / found["verify"]


if __name__ == "__main__":
    sys.exit(main())

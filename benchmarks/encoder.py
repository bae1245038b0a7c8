"""Stage 2 on MovieLens-100K with MiniLM: texts a second, and what a second run costs.

Three runs: all items with one worker, the same with as many as there are CPUs, and a run in which
the last one's artefact lacks one item in a hundred. The gate: all three give the same bytes, and
the last encodes the new texts only. Figures end the output, one a line: FIGURE name value.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.report import Report, parser
from rellax_ds import assets, runtime, schema
from rellax_ds.artifacts import WorkDir
from rellax_ds.config import load_recipe
from rellax_ds.partitions import disconnect, run_partitions, split_rows
from rellax_ds.retrieval import item_text, text_vectors
from rellax_ds.retrieval.encoder import ItemEncoder, distinct_texts
from rellax_ds.stages.pipeline import load_stage
from rellax_ds.tables import read_parquet, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

    from rellax_ds.artifacts import Manifest
    from rellax_ds.config import Recipe

SHARE_NEW = 0.01


def main() -> int:
    """Measure and print; 1 when the bytes differ."""
    arguments = parser(__doc__)
    arguments.add_argument("--partition-rows", type=int, default=256)
    options = arguments.parse_args()
    runtime.prepare()
    page = Report("encoder")
    with tempfile.TemporaryDirectory(prefix="rellax-encoder-") as name:
        folder = Path(name)
        recipe = load_recipe("ml100k_demo", [f"embeddings.partition_rows={options.partition_rows}"])
        tables = WorkDir(folder / "whole")
        load_stage("tables").run(recipe, tables)
        items = read_parquet(tables.stage_dir("tables") / "items.parquet", schema.ITEMS)
        rates = {
            n: rate(recipe, items, folder / f"workers-{n}", n) for n in (1, runtime.num_cpus())
        }
        whole = load_stage("embeddings").run(recipe, tables)
        again = incremental(recipe, items, WorkDir(folder / "again"))
    disconnect()
    texts, new = whole.counts["texts"], again.counts["encoded"]
    page.check(again.content == whole.content, "a run with kept vectors gives other bytes")
    page.check(0 < new <= texts * SHARE_NEW + 1, f"{new} of {texts} texts were encoded again")
    page.check(len({r[1] for r in rates.values()}) == 1, "the number of workers moves bytes")
    page.figures = {
        "encoder_texts": texts,
        **{f"encoder_texts_per_second_{n}_workers": r[0] for n, r in rates.items()},
        "encoder_all_seconds": whole.seconds,
        "encoder_new_texts": new,
        "encoder_new_seconds": again.seconds,
    }
    return page.finish(options.report)


def rate(recipe: Recipe, items: pa.Table, folder: Path, workers: int) -> tuple[float, bytes]:
    """Texts a second of warm workers, and the vectors."""
    settings = recipe.embeddings
    texts, _ = distinct_texts(item_text.render(items, settings.text))
    folder.mkdir()
    path = folder / "texts.arrow"
    text_vectors.write_texts(path, [texts[n] for n in text_vectors.by_length(texts)])
    arguments = {
        "texts_path": str(path),
        "model": assets.resolve_model(settings.encoder).reference,
        "batch_size": settings.batch_size,
        "max_tokens": settings.max_tokens,
        "device": settings.device,
    }
    parts = split_rows(len(texts), settings.partition_rows)
    out = folder / "out"
    records = run_partitions(
        "encoder", parts, ItemEncoder, arguments, out, "k", num_workers=workers, unit="texts"
    )
    # Loading the model is not encoding: the clock starts with the first committed partition.
    times = sorted((out / f"{r.name}.committed.json").stat().st_mtime for r in records)
    first = min(workers, len(times) - 1)
    encoded = len(texts) * (len(times) - first) / len(times)
    vectors = np.concatenate([np.load(out / f"{r.name}.npy") for r in records])
    return encoded / (times[-1] - times[first - 1]), vectors.tobytes()


def incremental(recipe: Recipe, items: pa.Table, work: WorkDir) -> Manifest:
    """Embed all but one item in a hundred, then all."""
    stage = load_stage("embeddings")
    manifest = None
    old = items.slice(int(items.num_rows * SHARE_NEW))
    for table in (old, items):
        attempt = work.open("tables", {"rows": str(table.num_rows)}, {})
        write_parquet(table, attempt.begin() / "items.parquet")
        attempt.commit({})
        start = time.monotonic()
        manifest = stage.run(recipe, work)
        runtime.logger.info("%d items: %.1f s", table.num_rows, time.monotonic() - start)
    assert manifest is not None
    return manifest


if __name__ == "__main__":
    sys.exit(main())

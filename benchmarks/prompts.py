"""Prompt assembly against the tokenizer: ids gathered from tables, or the rendered text encoded.

The log is MovieLens-100K where it has been fetched, else a made one; the tokenizer is SmolLM2's
where it has been fetched, else a small one of the same family. The tokenizer gets the finished text
of every prompt in one batch call, in the faster of two settings (one thread, or all). Assembly is
timed warm; cold, as a new worker begins, with a new builder and empty tables; and as the driver
begins, which also tries the tokenizer at every seam of the template. Passes of all of them take
turns, and medians are compared. The gate: ids equal the tokenizer's on every prompt.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken

from benchmarks.report import Report, parser
from rellax_ds import runtime
from rellax_ds.assets import resolve_dataset, resolve_model
from rellax_ds.config import DataConfig
from rellax_ds.errors import AssetError
from rellax_ds.prompts.assemble import Histories
from rellax_ds.prompts.render import History, PromptBuilder
from rellax_ds.prompts.templates import load_template
from rellax_ds.prompts.tokens import load_tokens
from rellax_ds.shards.pool import recent_histories
from rellax_ds.tables import movielens, split
from rellax_ds.testing import tiny_tokenizer, write_movielens_100k

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.prompts.render import Prompts
    from rellax_ds.prompts.spans import Cuts
    from rellax_ds.tables import Tables

SLOT = "<slot>"
TEMPLATES = ("question_answer", "plain")


class Job:
    """N prompts of one template: as columns, as text, and what turns either into ids."""

    def __init__(self, tables: Tables, reference: str, template: str, count: int, length: int):
        self._tables, self._reference, self._template = tables, reference, template
        samples = tables.samples.slice(max(tables.samples.num_rows - count, 0)).to_pydict()
        columns = {name: np.array(column) for name, column in samples.items()}
        self._users, self._items = columns["user"], columns["item"]
        self._labels = columns["label"]
        found = recent_histories(columns["history_start"], columns["history_end"], length)
        events = {
            name: tables.events.column(name).to_numpy()[found.events]
            for name in ("item", "rating", "label")
        }
        self._histories = Histories(
            found.offsets, events["item"], events["rating"], events["label"], found.drop_rank
        )
        self._tokens = load_tokens(reference)
        # The tokenizer itself, which is given the slots as a token of its own.
        self.tokenizer = load_tokens(reference)._tokenizer
        self.tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(SLOT, special=True)]}
        )
        self.builder = self.make()
        self.texts = [SLOT.join(self.builder.render(*row)) for row in self._rows()]

    def make(self, cuts: Cuts | None = None) -> PromptBuilder:
        """A builder with empty tables."""
        text = {
            name: {
                column: table.column(column).to_pylist()
                for column in table.column_names
                if str(table.schema.field(column).type) == "string"
            }
            for name, table in (("items", self._tables.items), ("users", self._tables.users))
        }
        return PromptBuilder(
            load_template(self._template),
            self._tokens,
            text["items"],
            text["users"],
            {"like_rule": "above 3", "max_rating": "5"},
            chat=True,
            soft_slots=True,
            max_tokens=1 << 20,
            cuts=cuts,
        )

    def assemble(self, builder: PromptBuilder) -> Prompts:
        """The prompts by assembly."""
        return builder.build_batch(self._users, self._items, self._labels, self._histories)

    def encode(self, parallel: bool) -> Any:
        """The prompts by the tokenizer, one batch call."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if parallel else "false"
        backend = self.tokenizer.backend_tokenizer
        return backend.encode_batch_fast(self.texts, add_special_tokens=not self.builder.wrapped)

    def equal(self) -> int:
        """How many prompts have the tokenizer's ids."""
        slot, same = self.tokenizer.convert_tokens_to_ids(SLOT), 0
        found = self.assemble(self.builder)
        for n, encoding in enumerate(self.encode(parallel=True)):
            ids = np.array(encoding.ids)
            ids[ids == slot] = self._tokens.slot_id
            place = slice(found.offsets[n], found.offsets[n + 1])
            same += np.array_equal(ids, found.input_ids[place])
        return same

    def _rows(self) -> list[tuple[int, int, History]]:
        bounds, histories = self._histories.offsets, self._histories
        rows = []
        for n in range(len(self._users)):
            place = slice(bounds[n], bounds[n + 1])
            history = History(
                histories.items[place],
                histories.ratings[place],
                histories.labels[place],
                np.argsort(histories.drop_rank[place]),
            )
            rows.append((int(self._users[n]), int(self._items[n]), history))
        return rows


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def inputs(folder: Path) -> tuple[Tables, str, str]:
    """Tables, tokenizer and their names."""
    try:
        raw, data = Path(resolve_dataset("movielens-100k").reference), "MovieLens-100K"
    except AssetError:
        raw, data = write_movielens_100k(folder / "raw", num_users=200, num_events=8000), "made log"
    try:
        reference, name = resolve_model("smollm2-135m-instruct").reference, "SmolLM2"
    except AssetError:
        reference, name = str(tiny_tokenizer(folder / "tokenizer")), "small byte-level BPE"
    return split.build_tables(movielens.read(raw), DataConfig()), str(reference), f"{data}, {name}"


def main() -> int:
    """Measure, check and print."""
    flags = parser(__doc__)
    flags.add_argument("--prompts", type=int, default=4000)
    flags.add_argument("--history-length", type=int, default=30)
    flags.add_argument("--passes", type=int, default=5)
    arguments = flags.parse_args()
    runtime.prepare()
    report = Report("prompts")
    rows, speedups, equal = [], [], True
    with tempfile.TemporaryDirectory() as folder:
        tables, reference, names = inputs(Path(folder))
        for template in TEMPLATES:
            job = Job(tables, reference, template, arguments.prompts, arguments.history_length)
            same, count = job.equal(), len(job.texts)
            report.check(same == count, f"{template}: {count - same} of {count} prompts differ")
            equal &= same == count
            calls: dict[str, Callable[[], object]] = {
                "tokenizer, one thread": lambda job=job: job.encode(parallel=False),
                "tokenizer, all threads": lambda job=job: job.encode(parallel=True),
                "assembly, driver": lambda job=job: job.assemble(job.make()),
                "assembly, cold": lambda job=job: job.assemble(job.make(job.builder.cuts)),
                "assembly, warm": lambda job=job: job.assemble(job.builder),
            }
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(arguments.passes):
                for name, call in calls.items():
                    seconds[name].append(timed(call))
            median = {name: statistics.median(values) for name, values in seconds.items()}
            tokenizer = min(value for name, value in median.items() if "tokenizer" in name)
            tokens = int(job.assemble(job.builder).lengths.sum())
            for name, value in median.items():
                rate = tokens / value / 1e6
                rows.append((template, name, count, tokens / count, value, rate, tokenizer / value))
            speedups.append(tokenizer / median["assembly, warm"])
            report.figures[f"prompt_cold_speedup_{template}"] = tokenizer / median["assembly, cold"]
            report.figures[f"prompt_tokens_speedup_{template}"] = speedups[-1]
    report.figures["prompt_tokens_speedup"] = min(speedups)
    report.figures["prompt_ids_equal"] = float(equal)
    report.check(min(speedups) >= 5, f"assembly is {min(speedups):.1f} times as fast, not 5")
    report.body.append(f"Log and tokenizer: {names}; history of {arguments.history_length}.")
    report.table(
        ("template", "way", "prompts", "tokens each", "seconds", "Mtokens/s", "times as fast"), rows
    )
    return report.finish(arguments.report)


if __name__ == "__main__":
    sys.exit(main())

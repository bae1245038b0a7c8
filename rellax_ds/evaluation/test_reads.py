"""When the test rows of a run were scored, and by how many different models.

Test figures are honest when they were looked at once, after everything was chosen on valid. A work
folder therefore keeps a line for every scoring of its test rows that was committed, also when the
scores themselves have been replaced since; reports print it.
"""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from rellax_ds import runtime
from rellax_ds.artifacts import fsync

if TYPE_CHECKING:
    from pathlib import Path

NAME = "test_reads.jsonl"
"""File in a work folder, one line per scoring."""


def record(root: Path, key: str, rows: int) -> None:
    """Note that the test rows are scored now; the same scoring, taken up again, is noted once.

    Args:
        root: The work folder.
        key: Key of the scoring: equal keys give equal scores.
        rows: Test rows.
    """
    if any(line["key"] == key for line in read(root)):
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = {"time": now, "key": key, "rows": rows, "commit": runtime.source_commit()}
    path = root / NAME
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            torn = file.read(1) != b"\n"  # by a process killed while it wrote
            file.write(b"\n" * torn)
        file.write(json.dumps(line).encode() + b"\n")
    fsync(path)


def read(root: Path) -> list[dict[str, Any]]:
    """The scorings in the order they happened; empty for a folder older than this record."""
    try:
        text = (root / NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the end of a killed process's write
            continue
    return found


def sentence(reads: list[dict[str, Any]], key: str) -> str | None:
    """What a report says of them; None where nothing is known.

    Args:
        reads: Of the folder.
        key: Key of the scoring that is reported.
    """
    number = next((n for n, line in enumerate(reads, 1) if line["key"] == key), None)
    if number is None:
        return None
    when = reads[number - 1]["time"]
    if number == 1:
        return f"The test rows were scored once before this page, on {when}, for these figures."
    return (
        f"The test rows were scored on {when} for these figures; scorings before that in this "
        f"folder, of other models or settings: {number - 1}. Who chose between those has used the "
        "test rows."
    )

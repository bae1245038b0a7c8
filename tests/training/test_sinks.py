"""The log that survives kills."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rellax_ds.training.sinks import JsonlSink, rewind

if TYPE_CHECKING:
    from pathlib import Path


def test_rewind_leaves_each_record_of_a_resumed_run_to_be_written_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sink = JsonlSink(path)
    events = [("valid", 0), ("step", 1), ("step", 2), ("valid", 2), ("step", 3), ("valid", 3)]
    for event, step in events:
        sink.write({"event": event, "step": step})
    sink.close()
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    rewind(path, step=2, scored=0)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["event"], r["step"]) for r in kept] == [("valid", 0), ("step", 1), ("step", 2)]


def test_log_writes_a_non_finite_loss_as_valid_json(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "log.jsonl")
    sink.write({"event": "step", "step": 1, "loss": float("nan")})
    sink.close()
    assert '"loss": null' in (tmp_path / "log.jsonl").read_text()

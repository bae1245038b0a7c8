"""The log that survives kills."""

from __future__ import annotations

import json
import resource
from typing import TYPE_CHECKING

import pytest

from rellax_ds.errors import CheckpointError
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


def test_log_lines_without_room_are_written_once_there_is_some(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given_up, kept = JsonlSink(tmp_path / "given_up"), JsonlSink(tmp_path / "kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
    try:
        for step in range(1, 5):
            for sink in (given_up, kept):
                sink.write({"event": "step", "step": step})
        with pytest.raises(CheckpointError, match="bytes of the log are not written; make room"):
            given_up.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("wait for room") == 2, "one line a file"
    kept.write({"event": "step", "step": 5})
    kept.close()
    written = kept.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2, 3, 4, 5]

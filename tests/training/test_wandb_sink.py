"""wandb gets a whole copy when it works, and costs a training nothing when it does not."""

from __future__ import annotations

import http.server
import importlib.machinery
import json
import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import pytest

from rellax_ds.config import Recipe, TrainConfig, load_recipe
from rellax_ds.errors import ConfigError
from rellax_ds.stages.train import run_train
from rellax_ds.training.wandb_sink import WandbSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rellax_ds.artifacts import WorkDir

KEY = "0123456789abcdef0123456789abcdef01234567"
SENTINEL = "hf_Xy7Qk2Lw9Zt4Rb6Vn8Mc1Ps3Hd5Jf0GaTe"
STEPS = 12
JOB = Path(__file__).parent / "wandb_job.py"


class FakeWandb(types.ModuleType):
    """The calls we make with the signatures of wandb 0.31; each takes `pause` seconds."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.pause = pause
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.Run.fake = self

    def note(self, called: str, /, **arguments: Any) -> None:
        time.sleep(self.pause)
        self.calls.append((called, arguments))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]

    class Settings:
        model_fields: ClassVar = {"silent": None, "console": None, "finish_timeout": None}

        def __init__(self, *, silent: bool, console: str, finish_timeout: float) -> None:
            self.chosen = (silent, console, finish_timeout)

    class Table:
        def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
            self.columns, self.data = columns, data

    class Artifact:
        def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
            self.name, self.type, self.metadata = name, type, metadata
            self.files: list[str] = []

        def add_file(self, local_path: str) -> None:
            self.files.append(Path(local_path).name)

    class Run:
        fake: ClassVar[FakeWandb]
        url, dir = "https://wandb/run", "dir"

        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}

        def define_metric(
            self, name: str, step_metric: str | None = None, summary: str | None = None
        ) -> None:
            self.fake.note("define_metric", name=name, step_metric=step_metric, summary=summary)

        def log(self, data: dict[str, Any]) -> None:
            self.fake.note("log", **data)

        def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
            self.fake.note("log_artifact", artifact=artifact, aliases=aliases)

        def finish(self) -> None:
            self.fake.note("finish", summary=dict(self.summary))

    def init(self, *, project: str, mode: str, dir: str, group: str, job_type: str, **rest: Any):
        self.note("init", project=project, mode=mode, group=group, job_type=job_type, **rest)
        return self.Run()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    made = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_is_copied_whole_and_every_secret_is_masked(
    recipe_file: Path,
    make_work: Callable[..., WorkDir],
    fake: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPANY_API_KEY", "plain-words-of-a-key")
    secrets = [f"description=see {SENTINEL}", "train.wandb_project=plain-words-of-a-key"]
    flags = ["train.wandb=online", "train.checkpoint_every=6"]
    work = make_work()
    run_train(load_recipe(recipe_file, [*flags, *secrets]), work)
    folder = work.stage_dir("train")
    log = lines(folder / "log.jsonl")
    steps = [r["train/loss"] for r in fake.of("log") if "train/loss" in r]
    assert steps == [r["loss"] for r in log if r["event"] == "step"]
    assert len(steps) == STEPS
    (start,) = fake.of("init")
    assert start["job_type"] == "train"
    assert start["group"].startswith("tiny-")
    assert start["config"]["train"]["epochs"] == 4
    best = max((r for r in log if r["event"] == "valid" and r["step"]), key=lambda r: r["auc"])
    (end,) = fake.of("finish")
    assert end["summary"] == {"best/step": best["step"], "best/auc": best["auc"]}
    tables = [r for r in fake.of("log") if "valid/prompts" in r]
    scored = lines(folder / "scored.jsonl")
    prompts = {r["sample"]: r["prompt"] for r in scored if r["event"] == "prompt"}
    shown = [r for r in scored if r["event"] == "valid"]
    assert [table["step"] for table in tables] == [0, 3, 6, 9, 12]
    rows = [row for table in tables for row in table["valid/prompts"].data]
    assert rows == [[*(r[k] for k in list(r)[1:]), prompts[r["sample"]]] for r in shown]
    assert len(prompts) == 10
    assert len({row[3] for row in rows}) > 10
    kinds = {call["artifact"].type: call["artifact"].files for call in fake.of("log_artifact")}
    assert kinds["shards"] == ["index.json"]
    assert "adapter_model.safetensors" in kinds["adapter"]
    told = repr([call for call in fake.calls if call[0] != "init"]) + repr(start["config"])
    files = [path.read_bytes() for path in work.root.rglob("*") if path.is_file()]
    for secret in (SENTINEL, "plain-words-of-a-key"):
        assert secret not in told
        assert not any(secret.encode() in content for content in files)


def test_wandb_of_thirty_seconds_a_call_is_left_behind_in_bounded_time(
    tmp_path: Path, fake: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    fake.pause = 30.0
    recipe = Recipe(name="made", train=TrainConfig(wandb="online"))
    start = time.monotonic()
    sink = WandbSink(recipe, tmp_path, "group", limit=8, patience=0.3)
    for step in range(1000):
        sink.write({"event": "step", "step": step, "loss": 1.0})
    assert time.monotonic() - start < 1.0
    sink.close()
    assert time.monotonic() - start < 2.0
    assert sink.dropped == 992
    assert "left behind" in caplog.text


def test_wandb_that_fails_is_counted_and_named_once(
    tmp_path: Path, fake: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = Recipe(name="made", train=TrainConfig(wandb="online"))
    sink = WandbSink(recipe, tmp_path, "group")
    sink.write({"event": "step", "step": 1})
    sink.keep(tmp_path / "absent", tmp_path / "absent.json")
    sink.keep(tmp_path / "absent", tmp_path / "absent.json")
    sink.close()
    assert sink.failures == 2
    assert len(fake.of("log")) == len(fake.of("finish")) == 1
    assert caplog.text.count("the training goes on without it") == 1
    assert "2 calls failed" in caplog.text


def test_wandb_that_is_not_installed_is_an_error_naming_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ConfigError, match=r"rellax-ds\[wandb\]"):
        WandbSink(Recipe(name="made"), tmp_path, "group")


class Refusing(http.server.BaseHTTPRequestHandler):
    """401 to everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(401)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815  # the name http.server looks for

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Base URL of a wandb that is `down`, `hangs` or `refuses`."""
    if request.param == "refuses":
        serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        serving.server_close()
        return
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            taken.listen(16)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def copy_in_a_process(
    folder: Path, mode: str, patience: int, **environment: str
) -> tuple[float, str]:
    """Seconds of the caller's own calls, and what the process said."""
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(b"w")
    (folder / "index.json").write_text("{}")
    before = {process.pid for process in psutil.process_iter()}
    done = subprocess.run(
        [sys.executable, str(JOB), mode, str(folder), str(patience)],
        env=os.environ | {"WANDB_API_KEY": KEY} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    left = [p for p in psutil.process_iter(["name"]) if p.pid not in before]
    assert not [p for p in left if "wandb" in (p.info["name"] or "")]
    assert not [p for p in folder.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert KEY not in done.stderr
    return float(done.stdout), done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize(
    "server",
    ["down", *(pytest.param(kind, marks=pytest.mark.slow_soak) for kind in ("hangs", "refuses"))],
    indirect=True,
)
def test_real_wandb_that_cannot_be_reached_costs_a_warning(server: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    start = time.monotonic()
    took, said = copy_in_a_process(tmp_path, "online", 2, WANDB_BASE_URL=server)
    assert took < 1.0
    assert time.monotonic() - start < 45
    assert "wandb: " in said
    assert "log.jsonl is complete" in said


@pytest.mark.distributed
def test_real_wandb_offline_keeps_a_run_that_can_be_synchronised(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    _, said = copy_in_a_process(tmp_path, "offline", 30)
    assert "failed" not in said
    assert "left behind" not in said
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"made-group" in run.read_bytes()
    assert b"made-adapter" in run.read_bytes()

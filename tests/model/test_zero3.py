"""The model in real ZeRO engines on two ranks, every parameter partitioned, like plain torch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

from rellax_ds.model import adapter_io

if TYPE_CHECKING:
    from collections.abc import Callable

    from rellax_ds.batch import Batch
    from rellax_ds.model.rellax import ReLLaX

_ROOT = Path(__file__).resolve().parents[2]

CASES = (
    {"family": "llama"},
    {"family": "llama", "checkpointing": True},
    {"family": "qwen2", "loss": "vocabulary"},
    {"family": "gpt2", "checkpointing": "reentrant"},
    {"family": "llama", "stage": 2},
    {"family": "llama", "stage": 0},
    {"family": "llama", "path": "reference", "dropout": 0.2},
    {"family": "qwen2", "path": "composable", "persistent": True, "checkpointing": True},
)
"""`path` is the compute path in the engine, where the plain run takes the best one; `persistent`
keeps every parameter whole on each rank, as ZeRO-3 does with small ones; `checkpointing` recomputes
activations, in the reentrant form where it says so."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.distributed
@pytest.mark.slow
def test_zero3_on_two_ranks_trains_and_saves_like_plain_torch(
    build: Callable[..., ReLLaX], backbones: dict[str, Path], batch: Batch, tmp_path: Path
) -> None:
    cases = []
    for index, case in enumerate(CASES):
        model = build(case["family"], dropout=case.get("dropout", 0.0))
        adapter_io.save(model, tmp_path / f"start{index}")
        cases.append(
            {
                "backbone": str(backbones[case["family"]]),
                "model": model.config.model_dump(mode="json"),
                "loss": case.get("loss", "yes_no"),
                "checkpointing": case.get("checkpointing", False),
                "path": case.get("path"),
                "persistent": case.get("persistent", False),
                "stage": case.get("stage", 3),
            }
        )
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    other = replace(batch, instance=batch.instance * 2, answer_labels=1 - batch.answer_labels)
    save_file(batch.tensors(), tmp_path / "batch0.safetensors")
    save_file(other.tensors(), tmp_path / "batch1.safetensors")
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    job = subprocess.run(
        [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_accelerators=2",
            f"--master_port={_free_port()}",
            "--no_local_rank",
            str(Path(__file__).with_name("zero3_job.py")),
            str(tmp_path),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (tmp_path / "done").exists(), job.stdout[-3000:] + job.stderr[-3000:]

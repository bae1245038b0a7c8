"""One rank of test_zero3.py: trains each case plainly and in the engine, and compares."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

from rellax_ds import runtime

runtime.prepare_engine(cuda=False)

import deepspeed
import torch
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig

from rellax_ds import ops
from rellax_ds.config import ModelConfig
from rellax_ds.model import adapter_io
from rellax_ds.model.rellax import ReLLaX, assemble, trainable_groups

STEPS = 3
OPTIONS = {"lr": 0.3, "weight_decay": 0.1}
ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
        "contiguous_gradients": False,
    },
}


def build(case: dict[str, object], start: Path) -> ReLLaX:
    config = ModelConfig(**case["model"])
    answers = {"yes": 11, "no": 12}
    torch.manual_seed(0)
    model = assemble(case["backbone"], config, answers, 6, 5, loss=case["loss"])
    adapter_io.restore(model, start)
    if case["checkpointing"]:
        model.enable_gradient_checkpointing(reentrant=case["checkpointing"] == "reentrant")
    return model.train()


def parameters(model: ReLLaX) -> list[torch.nn.Parameter]:
    return [p for group in trainable_groups(model).values() for p in group.values()]


def plain_losses(case: dict[str, object], start: Path, batches: list[dict]) -> list[list[float]]:
    model = build(case, start)
    optimizer = torch.optim.SGD(parameters(model), **OPTIONS)
    losses = []
    for step in range(STEPS):
        each = [seeded(model, batch, step) for batch in batches]
        (sum(each) / len(each)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in each])
    return losses


def seeded(model: ReLLaX, batch: dict, step: int) -> torch.Tensor:
    """Loss with the dropout masks every rank draws."""
    torch.manual_seed(step)
    return model(**batch)[0]


def engine_losses(
    case: dict[str, object], start: Path, batch: dict, end: Path
) -> tuple[list[float], torch.Tensor]:
    settings = copy.deepcopy(ZERO3)
    settings["zero_optimization"]["stage"] = case["stage"]
    if case["persistent"]:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 10**9
    alive = HfDeepSpeedConfig(settings)
    model = build(case, start)
    optimizer = torch.optim.SGD(parameters(model), **OPTIONS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if case["stage"] == 3:
        assert all(p.numel() == 0 for p in model.parameters()), "a parameter is not partitioned"
        assert {p.ds_persist for p in model.parameters()} == {case["persistent"]}
    losses = []
    with ops.using(case["path"]):
        for step in range(STEPS):
            torch.manual_seed(step)
            loss, _ = engine(**batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.eval()
        with torch.no_grad():
            _, logits = engine(**batch)
    adapter_io.save(model, end)
    torch.distributed.barrier()
    engine.destroy()
    del alive
    return losses, logits


def main(folder: Path) -> None:
    deepspeed.init_distributed()
    torch.distributed.barrier()
    runtime.forget_shared_memory()
    rank = torch.distributed.get_rank()
    batches = [load_file(folder / f"batch{index}.safetensors") for index in range(2)]
    for index, case in enumerate(json.loads((folder / "cases.json").read_text())):
        start, end = folder / f"start{index}", folder / f"end{index}"
        wanted = plain_losses(case, start, batches)
        losses, logits = engine_losses(case, start, batches[rank], end)
        torch.testing.assert_close(losses, [each[rank] for each in wanted], rtol=0, atol=1e-5)
        loaded = adapter_io.load(end, case["backbone"])
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batches[rank])[1], logits, rtol=0, atol=1e-5)
    if rank == 0:
        (folder / "done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

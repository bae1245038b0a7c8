"""Launch configurations timed for the suite's shapes; the sections that follow use them.

The table shows every choice beside the default of the same kernel, so it also says what a run
without tuning leaves. Choices stay in this process unless they are to be kept. Without a GPU there
is nothing to time, except in Triton's interpreter, where the same code runs on one tiny layer and
its times mean nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_suite import layer, step
from benchmarks.gpu_suite.timing import median_ms
from rellax_ds.kernels import tuning

if TYPE_CHECKING:
    from benchmarks.gpu_suite.suite import Section
    from rellax_ds.kernels.choices import Choice

SPARE = 15
"""Seconds of the section left to a candidate that is being compiled when time is up."""


def measure(section: Section, device: str, keep: bool = False) -> None:
    """Tune, and list what was chosen.

    Args:
        section: Where to report.
        device: `cuda` or `cpu`.
        keep: Write the choices to the cache folder, where training finds them.
    """
    made: list[Choice] = []
    if device == "cuda":
        stop = time.monotonic() + section.budget - SPARE
        for trains_factors in (True, False):
            made += tuning.tune(
                shapes(),
                dropout_p=layer.DROPOUT,
                trains_factors=trains_factors,
                save=keep,
                seconds=stop - time.monotonic(),
            )
        made = list(dict.fromkeys(made))
        if not made:
            section.failures.append("nothing could be tuned on this GPU")
    else:
        made = tuning.tune(
            [tuning.Shape(16, 32, 32, 8, samples=2)],
            dtype=torch.float32,
            device=device,
            save=False,
            timer=lambda call: median_ms(call, device),
        )
    table = section.table(
        "Median milliseconds of the default and of what was chosen, cold L2; a choice differs only "
        "if it is at least 2 % faster." + ("" if made else " Nothing can be timed without a GPU."),
        ["kernel", "T up to", "d_in", "d_out", "rank up to", "default", "best", "chosen", "failed"],
    )
    table.rows += [row(choice) for choice in made]
    section.failures += [
        f"no candidate of {choice.key.kernel} runs at {choice.key}"
        for choice in made
        if choice.ms is None
    ]


def shapes() -> list[tuning.Shape]:
    """The layers of the sections that follow: of the single layers, and of the training step."""
    found = [
        tuning.Shape(shape.tokens, shape.width, shape.width, shape.rank, shape.samples)
        for shape in layer.GPU_SHAPES
    ]
    samples, length = step.GPU["batch"]
    width = step.GPU["config"]["hidden_size"]
    return [*found, tuning.Shape(samples * length, width, width, 8, samples)]


def row(choice: Choice) -> list[object]:
    """One line of the table."""
    key, chosen = choice.key, choice.chosen
    said = chosen
    if not isinstance(chosen, str):
        said = " ".join(f"{name}={value}" for name, value in chosen.options().items())
    kernel = f"{key.kernel} ({key.form})" if key.form else key.kernel
    return [
        kernel,
        key.tokens,
        key.d_in,
        key.d_out,
        key.block_rank,
        choice.default_ms,
        choice.ms,
        said,
        f"{choice.failed} of {choice.tried}",
    ]

"""What was chosen for the Triton kernels, and the file that keeps it.

A choice belongs to one GPU model, one version of Triton and one range of batch sizes. All live in
one JSON file of the cache folder, whoever made them, so a folder may be shared by machines: entries
of others never match and are kept. A file or an entry that is not what this version writes is
ignored, and a file that cannot be written costs a line in the log.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rellax_ds import runtime
from rellax_ds.kernels import configs

FORMAT = 1
PATHS = ("triton", "cublas")
"""Compute paths `preferred` chooses between, the default first."""

PATH = "path"
"""Kernel of a key that chooses between `PATHS`."""

_FIELDS = {
    "gpu": str, "architecture": int, "triton": str, "kernel": str, "form": str, "tokens": int,
    "d_in": int, "d_out": int, "block_rank": int, "itemsize": int,
}  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """What runs the kernels.

    Attributes:
        gpu: Name of the GPU, or `interpreter`.
        architecture: Compute capability times ten; None is the interpreter.
        triton: Version of Triton.
    """

    gpu: str
    architecture: int | None
    triton: str


@dataclass(frozen=True)
class Key:
    """What a choice holds for.

    Attributes:
        gpu: Name of the GPU.
        architecture: Its compute capability times ten; None is the interpreter.
        triton: Version of Triton.
        kernel: One of `configs.KERNELS`, or `path`.
        form: What else the launch compiles in, such as dropout.
        tokens: T rounded up to a power of two.
        d_in: Width that comes in.
        d_out: Width that goes out.
        block_rank: Registers a rank takes, a power of two.
        itemsize: Bytes of an element.
    """

    gpu: str
    architecture: int | None
    triton: str
    kernel: str
    form: str
    tokens: int
    d_in: int
    d_out: int
    block_rank: int
    itemsize: int

    @classmethod
    def of(
        cls,
        kernel: str,
        like: torch.Tensor,
        sizes: tuple[int, int, int],
        block_rank: int,
        form: str = "",
    ) -> Key:
        """Key of a launch on the device and in the type of a tensor; sizes are T, d_in, d_out."""
        found = hardware(like.device)
        tokens = 1 << max(sizes[0] - 1, 0).bit_length()
        return cls(
            found.gpu, found.architecture, found.triton, kernel, form, tokens, *sizes[1:],
            block_rank, like.element_size(),
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A choice and how it came about.

    Attributes:
        key: What it holds for.
        chosen: Configuration of a kernel, or name of a compute path.
        ms: Median milliseconds of what was chosen; None where nothing could be timed.
        default_ms: The same of the default; None where the default does not run.
        tried: Number of candidates.
        failed: Number of those that did not run or computed something else.
    """

    key: Key
    chosen: configs.Launch | str
    ms: float | None = None
    default_ms: float | None = None
    tried: int = 0
    failed: int = 0


@functools.cache
def hardware(device: torch.device) -> Hardware:
    """What runs Triton's kernels on tensors of a device."""
    triton = importlib.import_module("triton")
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return Hardware("interpreter", None, triton.__version__)
    major, minor = torch.cuda.get_device_capability(device)
    return Hardware(torch.cuda.get_device_name(device), major * 10 + minor, triton.__version__)


def cache_file() -> Path:
    """The file of choices, in the cache folder."""
    return runtime.cache_dir() / "kernels" / "tuning.json"


def read() -> list[Choice]:
    """Choices of the file; none where it cannot be read."""
    try:
        path = cache_file()
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        runtime.logger.warning("kernel tuning: cannot read the cache: %s", line(error))
        return []
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        entries = list(content["choices"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        runtime.logger.warning("kernel tuning: %s is ignored: %s", path, line(error))
        return []
    found = [_parsed(entry) for entry in entries]
    good = [choice for choice in found if choice is not None]
    if len(good) < len(found):
        runtime.logger.warning(
            "kernel tuning: %d entries of %s are ignored", len(found) - len(good), path
        )
    return good


def write(choices: list[Choice]) -> None:
    """Merge choices into the file; the last writer wins."""
    if not choices:
        return
    merged = {choice.key: choice for choice in [*read(), *choices]}
    content = {"format": FORMAT, "choices": [asdict(choice) for choice in merged.values()]}
    temporary = None
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
        ) as file:
            temporary = Path(file.name)
            json.dump(content, file, indent=1)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        runtime.logger.warning("kernel tuning: the choices are not kept: %s", line(error))
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _parsed(entry: Any) -> Choice | None:
    """A choice as the file has it, or None where it is not one."""
    try:
        fields, chosen = entry["key"], entry["chosen"]
        if set(fields) != set(_FIELDS):
            return None
        if not all(type(fields[name]) is kind for name, kind in _FIELDS.items()):
            return None
        key = Key(**fields)
        ms, default_ms = (
            None if entry[name] is None else float(entry[name]) for name in ("ms", "default_ms")
        )
        if key.kernel == PATH:
            return Choice(key, chosen, ms, default_ms) if chosen in PATHS else None
        if key.kernel not in configs.KERNELS:
            return None
        tiles = tuple((str(name), int(size)) for name, size in chosen["tiles"])
        config = configs.Launch(tiles, int(chosen["num_warps"]), int(chosen["num_stages"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return Choice(key, config, ms, default_ms) if configs.valid(key.kernel, config) else None


def line(error: BaseException) -> str:
    """An error in one line."""
    text = (str(error) or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"

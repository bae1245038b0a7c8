"""The DeepSpeed JSON and the recipe, merged into one dictionary without a guess left in it.

Each owns its part: the JSON owns ZeRO stage, offload, buckets and communication; the recipe owns
batch, accumulation, precision, clipping and optimiser. A key that both set to different values is
an error naming both, because either choice would silently discard what somebody wrote. `"auto"` is
refused: here nothing fills it in. Accumulation is computed in this file and nowhere else.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rellax_ds.config import digest
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from rellax_ds.config import TrainConfig

EPSILON = 1e-8
"""AdamW's epsilon; one value for every recipe."""

_JSON_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "communication_data_type",
        "comms_logger",
        "data_types",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches each rank accumulates before one optimiser step.

    Args:
        global_batch: Samples behind one optimiser step, all ranks together.
        micro_batch: Samples of one forward pass on one rank; divides `global_batch`.
        world_size: Number of ranks.

    Raises:
        ConfigError: The global batch cannot be shared out evenly; names the world sizes that work.
    """
    if global_batch % (micro_batch * world_size) == 0:
        return global_batch // (micro_batch * world_size)
    shares = global_batch // micro_batch
    fitting = [str(size) for size in range(1, shares + 1) if shares % size == 0]
    raise ConfigError(
        f"train.global_batch {global_batch} is not a multiple of train.micro_batch {micro_batch} "
        f"x {world_size} ranks; with these batches the number of ranks can be "
        f"{', '.join(fitting)}"
    )


def find_ds_config(path: Path) -> Path:
    """The DeepSpeed JSON a recipe names: from the working folder, else from the checkout's root.

    Raises:
        ConfigError: There is no such file in either place.
    """
    checkout = Path(__file__).resolve().parents[2]
    for candidate in (path.expanduser(), checkout / path):
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(
        f"train.ds_config {path}: no such file (looked in {Path.cwd()} and {checkout}); "
        "give the path of a DeepSpeed JSON, for example --set train.ds_config=PATH"
    )


def read_ds_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check what can be checked without a recipe.

    Raises:
        ConfigError: The file is absent, is not a JSON object, holds an unknown top-level key or
            holds `"auto"`.
    """
    found = find_ds_config(path)
    try:
        document = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{found}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{found}: expected a JSON object, found {type(document).__name__}")
    recipe_keys = ("bf16", "fp16", "optimizer", "scheduler", *_BATCH_KEYS)
    for key in document:
        if key not in _JSON_KEYS and key not in recipe_keys:
            near = difflib.get_close_matches(key, sorted(_JSON_KEYS), n=1, cutoff=0.0)[0]
            raise ConfigError(f"{found}: unknown key '{key}'; the nearest valid key is '{near}'")
    for key, value in _leaves(document):
        if value == "auto":
            raise ConfigError(
                f"{found}: '{key}' is \"auto\"; write the value, or leave out a key the recipe owns"
            )
    return document


def ds_config_digest(train: TrainConfig) -> str:
    """Digest of the JSON's content, part of the training artefact's key."""
    return digest(read_ds_config(train.ds_config))


def resolve_ds_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """Merge the recipe's JSON with the recipe into the dictionary DeepSpeed is given.

    Args:
        train: The recipe's training section; `train.ds_config` names the JSON.
        world_size: Number of ranks.

    Returns:
        A complete configuration; batch, accumulation, precision and clipping are the recipe's.

    Raises:
        ConfigError: The two disagree on a key, or the batch cannot be shared among the ranks.
    """
    document = read_ds_config(train.ds_config)
    owned = _recipe_values(train, world_size)
    where = find_ds_config(train.ds_config)
    _refuse_conflicts(document, owned, where)
    resolved = {key: value for key, value in document.items() if key in _JSON_KEYS}
    resolved["zero_optimization"] = dict(document.get("zero_optimization", {"stage": 0}))
    resolved |= {key: value for key, (value, _) in owned.items() if key in _BATCH_KEYS}
    resolved["bf16"] = {"enabled": train.precision == "bf16"}
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, nothing to compile
    resolved.setdefault("steps_per_print", 2**31 - 1)
    return resolved


def zero_stage(resolved: dict[str, Any]) -> int:
    """ZeRO stage of a resolved configuration."""
    return int(resolved["zero_optimization"].get("stage", 0))


_BATCH_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def _recipe_values(train: TrainConfig, world_size: int) -> dict[str, tuple[Any, str]]:
    """DeepSpeed key to the recipe's value and the recipe's name for it."""
    accumulation = accumulation_steps(train.global_batch, train.micro_batch, world_size)
    return {
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (
            accumulation,
            "train.global_batch / (train.micro_batch x ranks)",
        ),
        "gradient_clipping": (train.clip, "train.clip"),
        "bf16.enabled": (train.precision == "bf16", f"train.precision {train.precision}"),
        "fp16.enabled": (False, f"train.precision {train.precision}"),
        "optimizer.type": ("AdamW", "the optimiser"),
        "optimizer.params.lr": (train.learning_rate, "train.learning_rate"),
        "optimizer.params.betas": (list(train.betas), "train.betas"),
        "optimizer.params.eps": (EPSILON, "AdamW's epsilon"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
    }


def _refuse_conflicts(
    document: dict[str, Any], owned: dict[str, tuple[Any, str]], where: Path
) -> None:
    if "scheduler" in document:
        raise ConfigError(
            f"{where}: 'scheduler' conflicts with train.schedule and train.warmup, which own the "
            "learning rate; remove the key"
        )
    for key, value in _leaves(document):
        if key.split(".")[0] in _JSON_KEYS or key in {"bf16", "fp16", "optimizer"}:
            continue
        if key not in owned:
            raise ConfigError(
                f"{where}: '{key}' ({value!r}) belongs to the recipe's train section; remove it"
            )
        expected, name = owned[key]
        if value != expected:
            raise ConfigError(
                f"{where}: '{key}' is {value!r}, but the recipe's {name} is {expected!r}; "
                "remove the key from the JSON or change the recipe"
            )


def _leaves(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and value of everything that is not a mapping; lists are values."""
    leaves: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves

"""The recipe: one frozen, complete description of a run, and the only way a number enters the
system.

A recipe is a YAML file with eight sections, one per concern. It may extend one parent (`extends:
NAME`) and change a few fields; `--set a.b=value` changes single fields on the command line. Unknown
keys, wrong types and impossible combinations are one-line errors that name the key, the value and
the nearest valid key. The digest of the sections a stage reads decides whether its artefact is
still valid, so every value that can change an output lives here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from rellax_ds.crm_config import CRM_NAMES as CRM_NAMES
from rellax_ds.crm_config import CRMConfig as CRMConfig
from rellax_ds.crm_config import CRMKind as CRMKind
from rellax_ds.data_config import DataConfig as DataConfig
from rellax_ds.errors import ConfigError
from rellax_ds.family import Head, Init, InteractionSpec, Kind
from rellax_ds.section import Fraction, PositiveFloat, PositiveInt, Section

_MAX_RECIPE_BYTES = 1 << 20
_MAX_DEPTH = 50


class EmbeddingsConfig(Section):
    """Stage 2: how an item's text becomes a unit vector."""

    encoder: str = Field(
        default="all-minilm-l6-v2",
        description="Asset name, Hugging Face name, local path, or 'backbone'.",
    )
    text: str = Field(
        default="Movie: {title}. Genre: {genre}.",
        description="Item text; fields are columns of the item table.",
    )
    dimensions: PositiveInt | None = Field(
        default=None, description="PCA components; null keeps the encoder's own space."
    )
    batch_size: PositiveInt = 64
    max_tokens: PositiveInt = 128
    partition_rows: PositiveInt = Field(default=2048, description="Items in one partition of work.")
    device: Literal["cpu", "cuda"] = "cpu"


class RetrievalConfig(Section):
    """Stage 3: SUBR, the behaviours most similar to the target."""

    num_retrieved: PositiveInt = Field(default=30, description="K, events kept for a sample.")
    partition_rows: PositiveInt = Field(
        default=65536, description="Samples in one partition of work, on average."
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Where the search runs; the result is the same."
    )
    heterogeneity_at: tuple[PositiveInt, ...] = Field(
        default=(5, 10, 15, 20, 25, 30), description="K at which it is reported."
    )


class ShardsConfig(Section):
    """Stage 5: which samples become prompts, and how a prompt is written."""

    template: str = Field(
        default="question_answer",
        description="Name of a shipped prompt template, or a path to one.",
    )
    chat: bool = Field(
        default=True, description="Wrap the prompt in the tokenizer's own chat template."
    )
    history: Literal["recent", "retrieved", "high", "low", "mixed", "half_mixed"] = Field(
        default="recent",
        description="Last K; top K by time, falling or rising similarity; or recent and retrieved"
        " rows in turn, of every shot or of half as many.",
    )
    history_length: PositiveInt = Field(
        default=10, description="K, history items in a prompt before truncation."
    )
    max_tokens: PositiveInt = Field(
        default=512, description="Longer prompts lose history items, never the question."
    )
    train_rows: PositiveInt = Field(
        default=800, description="Shots: the first rows of a seeded pool of the training split."
    )
    train_from: Literal["all", "holdout"] = Field(
        default="all", description="Draw shots from all of train or crm.holdout only."
    )
    valid_rows: PositiveInt | None = Field(
        default=200, description="Seeded sample of valid; null takes every row."
    )
    test_rows: PositiveInt | None = Field(
        default=1000, description="Seeded sample of test; null takes every row."
    )
    samples_per_shard: PositiveInt = 256


class ModelConfig(Section):
    """The LLM and what is trained on it: CFLoRA (A, B, M(h)) and SPA."""

    backbone: str = Field(
        default="smollm2-135m-instruct", description="Asset name, Hugging Face name or local path."
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="Frozen linear layers in 4-bit NormalFloat, or in the training's precision.",
    )
    rank: PositiveInt = Field(default=8, description="Rank of A and B, all experts together.")
    alpha: PositiveFloat = Field(default=16.0, description="The update is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    interaction: Kind = Field(
        default="full", description="M: identity is plain LoRA, full is CFLoRA."
    )
    interaction_init: Init = Field(default="identity", description="M(h) = I + f(h), or Kaiming.")
    interaction_head: Head = Field(
        default="mlp", description="Computes every entry of M, or factors of M - I (full only)."
    )
    interaction_hidden: PositiveInt | None = Field(
        default=None,
        description="Width of the gate's hidden layer; null is 2 r^2 for a dense mlp, else 64.",
    )
    interaction_factors: PositiveInt | None = Field(
        default=None, description="Rank of M - I under the factorised head; null is 4."
    )
    interaction_experts: PositiveInt = Field(
        default=4, description="Bands the rank is cut into, for kinds with experts."
    )
    interaction_temperature: PositiveFloat = Field(
        default=1.0, description="Divides the logits of kinds with a router."
    )
    interaction_shared: bool = Field(default=False, description="One router for all layers.")
    interaction_scale: PositiveFloat = Field(
        default=1.0, description="c in M = I + c f(h); kinds with a router have none."
    )
    train_factors: bool = Field(
        default=True, description="Train A and B; false trains the gates and SPA only."
    )
    adapter: Path | None = Field(
        default=None, description="Adapter folder to start from, for the second training phase."
    )
    spa: bool = Field(
        default=True, description="Soft tokens carrying the recommender's item embeddings."
    )
    spa_bottleneck: PositiveInt | None = Field(
        default=None, description="Hidden width of the projector; null is the LLM's."
    )
    interaction_scope: Literal["prompt", "question"] = Field(
        default="prompt",
        description="Tokens M(h) acts on: all, or the target's question only (the history before "
        "it is plain LoRA then, so its answers cannot be read off h; ours, not published).",
    )
    residual: Literal["none", "crm", "stacked"] = Field(
        default="none",
        description="The score is a times the recommender's logit plus w times the LLM's plus b, "
        "fitted on valid (ours, not published). crm: the LLM is trained inside that sum; stacked: "
        "by itself.",
    )
    packing: bool = Field(
        default=True,
        description="Lay prompts end to end; false pads them to the longest of a batch.",
    )
    instance_control: Literal["none", "const", "permuted"] = Field(
        default="none", description="Ablation of h."
    )

    @model_validator(mode="after")
    def _interaction_defined(self) -> ModelConfig:
        _ = self.spec
        if self.interaction_scope == "question" and not self.packing:
            raise ValueError("interaction_scope question needs packing true")
        return self

    @property
    def spec(self) -> InteractionSpec:
        """What the interaction fields say about M(h)."""
        return InteractionSpec.of(self, self.rank)


class TrainConfig(Section):
    """Stage 6: the optimiser and the loop; the DeepSpeed JSON owns ZeRO and communication."""

    ds_config: Path = Field(
        default=Path("ds_configs/zero3_fp32_cpu.json"), description="DeepSpeed JSON."
    )
    num_processes: PositiveInt = Field(
        default=1, description="Ranks that `rellax run` starts on this machine."
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    loss: Literal["yes_no", "vocabulary"] = Field(
        default="yes_no", description="Two-way or whole-vocabulary cross entropy."
    )
    history_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="Weight of a history answer, times the target's (ours, not published).",
    )
    epochs: int = Field(
        default=1, ge=0, description="Passes over the shots; 0: zero-shot, the untrained model."
    )
    global_batch: PositiveInt = 16
    micro_batch: PositiveInt = 8
    learning_rate: PositiveFloat = Field(default=5e-4, description="For A and B.")
    interaction_learning_rate: PositiveFloat = Field(
        default=1e-3, description="For the gates and the SPA projector."
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup: Fraction = Field(
        default=0.1, description="Share of the steps with a rising learning rate."
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    schedule_epochs: PositiveInt | None = Field(
        default=None, description="Epochs the schedule is stretched over; null: train.epochs."
    )
    clip: PositiveFloat = 1.0
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass."
    )
    reentrant_checkpointing: bool = Field(
        default=False, description="Do so in torch's older, reentrant form."
    )
    centre_logit: bool = Field(
        default=True, description="Subtract the untrained model's mean yes-no logit over valid."
    )
    eval_every: PositiveInt | None = Field(
        default=None, description="Steps between valid scores; null: at the epoch's end."
    )
    eval_batch: PositiveInt = 16
    patience: PositiveInt | None = Field(
        default=None, description="Valid scores without a gain before stopping."
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None, description="Steps between checkpoints; null: with each score."
    )
    keep_last: Annotated[int, Field(ge=2)] = 2
    max_skips: PositiveInt = Field(
        default=3, description="Skipped (non-finite) steps in a row before training stops."
    )
    verify: Literal["sha256", "size"] = Field(
        default="sha256",
        description="Check of the shards at the start; size: leave huge sets to the checksum that "
        "every sample has.",
    )
    hang_timeout: PositiveFloat = Field(
        default=1800.0,
        description="Seconds without progress (a micro-batch, a checkpoint, loading the model) "
        "after which a job of several ranks ends and names the rank it waits for.",
    )
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "rellax-ds"

    @model_validator(mode="after")
    def _schedule_long_enough(self) -> TrainConfig:
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise ValueError(
                f"schedule_epochs {self.schedule_epochs} is less than epochs {self.epochs}: the "
                "learning rate would be 0 before the end"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of micro_batch {self.micro_batch}"
            )
        return self


class PredictConfig(Section):
    """Stages 7 and 8: scoring and what the report computes from the scores."""

    batch_size: PositiveInt = 16
    partition_rows: PositiveInt = Field(
        default=256, description="Samples in one partition of work."
    )
    device: Literal["cpu", "cuda"] = "cpu"
    bootstrap: PositiveInt = Field(
        default=1000, description="Resamples of users behind each 95 % interval."
    )


class Recipe(Section):
    """One complete run."""

    name: str
    description: str = ""
    seed: int = Field(default=42, ge=0, le=2**31 - 1)
    data: DataConfig = DataConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    crm: CRMConfig = CRMConfig()
    shards: ShardsConfig = ShardsConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()

    @model_validator(mode="after")
    def _combinations_possible(self) -> Recipe:
        if (
            self.shards.history != "recent"
            and self.retrieval.num_retrieved < self.shards.history_length
        ):
            raise ValueError(
                f"shards.history_length {self.shards.history_length} needs at least as many "
                f"retrieval.num_retrieved, it is {self.retrieval.num_retrieved}"
            )
        if self.crm.kind == "sim" and self.retrieval.num_retrieved < self.crm.history_length:
            raise ValueError(
                f"crm.kind sim reads {self.crm.history_length} retrieved events; "
                f"retrieval.num_retrieved is {self.retrieval.num_retrieved}"
            )
        if self.shards.train_from == "holdout" and self.crm.holdout == 0:
            raise ValueError("shards.train_from holdout needs crm.holdout above 0")
        if (
            self.model.interaction == "identity"
            and not self.model.train_factors
            and not self.model.spa
        ):
            raise ValueError(
                "model.interaction identity with train_factors false and spa false trains nothing"
            )
        if self.model.residual != "none" and self.train.loss != "yes_no":
            raise ValueError(
                f"model.residual {self.model.residual} adds to the yes-no logit; set train.loss "
                "to yes_no"
            )
        if not self.model.train_factors and self.model.adapter is None:
            raise ValueError(
                "model.train_factors false starts from B = 0 and can learn nothing; "
                "set model.adapter to a trained adapter or train_factors to true"
            )
        return self

    def section_digest(self, *keys: str) -> dict[str, str]:
        """Digests of parts of the recipe, by dotted key, for the manifest of a stage that reads
        them.
        """
        document = self.model_dump(mode="json")
        return {key: digest(_lookup(document, key)) for key in keys}

    @property
    def digest(self) -> str:
        """Digest of the whole recipe."""
        return digest(self.model_dump(mode="json"))


def digest(value: object) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """Name to file of every recipe that ships with the package."""
    folder = Path(str(resources.files("rellax_ds"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe by shipped name or by path, apply its parents and the command line's overrides.

    Args:
        name: Name of a shipped recipe, or path to a YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        ConfigError: The file is absent or not a recipe, a key is unknown, or a value is wrong.
    """
    path = _recipe_path(name)
    document = _resolve_parents(path, seen=())
    document.setdefault("name", path.stem)
    origins = {}
    for override in overrides or []:
        key, value = _parse_override(override)
        _assign(document, key, value, override)
        origins[key] = f"--set {override}"
    return parse_recipe(document, str(path), origins)


def parse_recipe(
    document: dict[str, Any], where: str, origins: dict[str, str] | None = None
) -> Recipe:
    """Validate a recipe given as a mapping; `where` and `origins` (dotted key to source) go into
    the message.
    """
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_explain(error, where, origins or {})) from None


def recipe_keys() -> list[str]:
    """Every dotted key a recipe may hold."""
    return _keys_of(Recipe, "")


def _keys_of(section: type[Section], prefix: str) -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        keys += _keys_of(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def _recipe_path(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise ConfigError(
                f"recipe {path}: no such file; give a path to a YAML file or a shipped name"
            )
        return path
    shipped = shipped_recipes()
    if str(name) not in shipped:
        raise ConfigError(
            f"recipe '{name}' is not shipped; choose {', '.join(shipped)} or a .yaml path"
        )
    return shipped[str(name)]


def _resolve_parents(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(p.name for p in (*seen, resolved))
        raise ConfigError(f"recipe {path}: 'extends' runs in a circle: {chain}")
    document = read_yaml(path)
    parent = document.pop("extends", None)
    if parent is None:
        return document
    beside = path.parent / str(parent)
    base = _resolve_parents(beside if beside.is_file() else _recipe_path(parent), (*seen, resolved))
    base.pop("name", None)
    return _merge(base, document)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds, without aliases and of bounded size and depth.

    Raises:
        ConfigError: It is none.
    """
    if path.stat().st_size > _MAX_RECIPE_BYTES:
        raise ConfigError(
            f"recipe {path}: larger than {_MAX_RECIPE_BYTES} bytes, this is no recipe"
        )
    try:
        text = path.read_text(encoding="utf-8")
        events = list(yaml.parse(text, Loader=yaml.SafeLoader))
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ConfigError(f"recipe {path}: YAML aliases are not allowed; write the value out")
        depth = deepest = 0
        for event in events:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            deepest = max(deepest, depth)
        if deepest > _MAX_DEPTH:
            raise ConfigError(f"recipe {path}: nested deeper than {_MAX_DEPTH} levels")
        document = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"recipe {path}: not UTF-8 at byte {error.start}; save it as UTF-8"
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"recipe {path}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(
            f"recipe {path}: expected a mapping of sections, found {type(document).__name__}"
        )
    return document


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_override(override: str) -> tuple[str, object]:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, for example --set train.epochs=2")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError:
        return key.strip(), text


def _assign(document: dict[str, Any], key: str, value: object, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = document.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {override}: '{parent}' is a value, not a section{_nearest(key)}"
            )
        document = child
    document[last] = value


def _explain(error: ValidationError, where: str, origins: dict[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    related = (text for origin, text in origins.items() if (key + ".").startswith(origin + "."))
    inner = (text for origin, text in origins.items() if origin.startswith(key + "."))
    source = next(related, next(inner, f"recipe {where}"))
    if first["type"] == "extra_forbidden":
        return f"{source}: unknown key '{key}' (value {first['input']!r}){_nearest(key)}"
    reason = first["msg"].removeprefix("Value error, ")
    if not key or isinstance(first["input"], dict):
        prefix = f"'{key}': " if key else ""
        return f"{source}: {prefix}{reason}"
    return f"{source}: '{key}' is {first['input']!r}: {reason[0].lower()}{reason[1:]}"


def _nearest(key: str) -> str:
    keys = recipe_keys()
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
    same_section = [k for k in keys if k.split(".")[0] == key.split(".")[0]]
    if same_section:
        close = difflib.get_close_matches(key, same_section, n=1, cutoff=0.0) or close
    return f"; the nearest valid key is '{close[0]}'"


def _lookup(document: dict[str, Any], key: str) -> object:
    value: Any = document
    for part in key.split("."):
        value = value[part]
    return value

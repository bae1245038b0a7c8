"""The arms of `benchmarks.train_step`: the same samples trained in several ways, each in a process
of its own.

`trainer` is what a user of Hugging Face writes: `Trainer`, PEFT's LoRA, labels of -100 everywhere
but at the answer, the stock collator. `trainer_answers` is the same with logits at the answer
positions only. `lora` is ours with M = I and no soft tokens, `rellax` ours as the recipe trains it,
`rellax_zero3` the same in stage 6's engine; `_torch` stands for torch's own products in the frozen
layers, which is what a CPU of Intel's gets. Arms without SPA read the prompts without the
soft-token slots, so all arms have the same words. An arm waits for its turn at the top of every
step, so that whoever holds the other end of the link can time it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rellax_ds import runtime
from rellax_ds.artifacts import WorkDir
from rellax_ds.assets import resolve_model
from rellax_ds.config import Recipe, load_recipe
from rellax_ds.engine.ds_config import EPSILON, resolve_ds_config
from rellax_ds.shards.collate import Collator
from rellax_ds.shards.order import step_batches
from rellax_ds.shards.read import Sample, ShardReader
from rellax_ds.stages.pipeline import load_stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from rellax_ds.batch import Batch
    from rellax_ds.config import TrainConfig
    from rellax_ds.engine.engine import ParameterGroup
    from rellax_ds.model.rellax import ReLLaX

ARMS = (
    *("trainer", "trainer_answers"),
    *("lora_torch", "lora", "rellax_torch", "rellax", "rellax_zero3"),
)
IGNORED = -100
STAGES = ("tables", "crm", "shards")


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Attributes:
        recipe: The recipe whose prompts, batches and adapter are used.
        shards: Folder of stage 5.
        steps: Optimiser steps, warm-up included.
        threads: Threads of torch.
    """

    recipe: Recipe
    shards: Path
    steps: int
    threads: int


def prepare(recipe_name: str, work_dir: Path | None, steps: int, threads: int | None) -> Setting:
    """Run, or skip, the stages behind the prompts; by default the recipe's own work folder and as
    many threads as a rank of it has on this machine.
    """
    recipe = load_recipe(recipe_name)
    work = WorkDir(work_dir or runtime.default_work_dir(recipe.name))
    for stage in STAGES:
        load_stage(stage).run(recipe, work)
    threads = threads or max(runtime.num_cpus() // recipe.train.num_processes, 1)
    return Setting(recipe, work.stage_dir("shards"), steps, threads)


class Prompts:
    """The samples of every step, in the recipe's own order and micro-batches."""

    def __init__(self, setting: Setting) -> None:
        """Open the training shards."""
        self._setting, self.reader = setting, ShardReader.open(setting.shards, "train")
        self.index = self.reader.index

    def step(self, step: int, slots: bool) -> list[list[Sample]]:
        """Micro-batches of one optimiser step; without `slots` the soft-token positions are cut."""
        train = self._setting.recipe.train
        steps = len(self.reader) // train.global_batch
        batches = step_batches(
            self.reader,
            self._setting.recipe.seed,
            step // steps,
            step % steps,
            train.global_batch,
            train.micro_batch,
            rank=0,
            world_size=1,
        )
        made = [[self.reader[position] for position in batch] for batch in batches]
        return made if slots else [[without_slots(sample) for sample in batch] for batch in made]

    def words(self, step: int) -> int:
        """Tokens of a step that are neither padding nor soft-token slots."""
        return sum(s.tokens.shape[1] for batch in self.step(step, slots=False) for s in batch)

    def answer(self, sample: Sample) -> int:
        """Token id of a sample's answer."""
        return int(self.index.answer_ids[0 if sample.label else 1])


def without_slots(sample: Sample) -> Sample:
    """The prompt a plain LLM reads: the same words, no place for soft tokens."""
    return replace(sample, tokens=np.ascontiguousarray(sample.tokens[:, sample.tokens[1] < 0]))


def features(sample: Sample, answer: int) -> dict[str, list[int]]:
    """A training example of `Trainer`: the prompt and its answer, which alone is a label."""
    prompt = sample.tokens[0].tolist()
    return {
        "input_ids": [*prompt, answer],
        "attention_mask": [1] * (len(prompt) + 1),
        "labels": [IGNORED] * len(prompt) + [answer],
    }


def run(arm: str, setting: Setting, link: Connection) -> None:
    """Train `setting.steps` steps, each when told to, then send what was seen and leave."""
    # A Trainer prints a summary when it ends; a benchmark's output holds its own figures only.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as scratch:
        runtime.prepare()
        runtime.logger.setLevel(logging.WARNING)
        quieten()
        torch.set_num_threads(setting.threads)
        turns = Turns(link)
        if arm.startswith("trainer"):
            run_trainer(setting, turns, Path(scratch), answers_only=arm == "trainer_answers")
        elif arm == "rellax_zero3":
            run_engine(setting, turns)
        else:
            with torch.backends.mkldnn.flags(enabled=not arm.endswith("_torch")):
                run_ours(setting, turns, plain=arm.startswith("lora"))
        link.send(turns.outcome())


def quieten() -> None:
    """Leave out what libraries say on the way."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()


class Turns:
    """One arm's side of the link.

    Attributes:
        loaded: Resident bytes when the model was whole and nothing had been computed.
        losses: One a micro-batch, or their mean alone, to see that an arm trains.
        busy: CPU seconds of every step.
    """

    def __init__(self, link: Connection) -> None:
        """Take this side of the link."""
        self._link, self._mark, self.loaded = link, 0.0, 0
        self.losses: list[float] = []
        self.busy: list[float] = []

    def wait(self) -> None:
        """Say that the next step can begin, and return when it may."""
        if self.loaded:
            self.busy.append(time.process_time() - self._mark)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.loaded = _status("VmRSS")
        self._link.send(None)
        self._link.recv()
        self._mark = time.process_time()

    def outcome(self) -> Outcome:
        """What the arm saw, after its last step."""
        return Outcome(
            self.loaded, _status("VmHWM"), sum(self.losses) / len(self.losses), self.busy
        )


@dataclass(frozen=True)
class Outcome:
    """What an arm says at its end.

    Attributes:
        loaded: Resident bytes before the first step.
        peak: Most resident bytes since then.
        loss: Mean loss over the steps.
        busy: CPU seconds of every step.
    """

    loaded: int
    peak: int
    loss: float
    busy: list[float]


def run_ours(setting: Setting, turns: Turns, plain: bool) -> None:
    """Our model in the barest loop: forward, backward, clip, AdamW."""
    recipe = without_conditions(setting.recipe) if plain else setting.recipe
    train, prompts = recipe.train, Prompts(setting)
    model = resident(ours(recipe, prompts).train())
    groups = [
        {"params": list(g.parameters.values()), "lr": g.learning_rate}
        for g in parameter_groups(model, train)
    ]
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(
        groups, betas=train.betas, eps=EPSILON, weight_decay=train.weight_decay, fused=True
    )
    for batches in our_batches(setting, prompts, recipe, turns):
        for batch in batches:
            loss, _ = model(**batch.tensors())
            (loss / len(batches)).backward()
            turns.losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_engine(setting: Setting, turns: Turns) -> None:
    """The same under ZeRO-3 on one rank, through the engine that stage 6 uses."""
    from rellax_ds.engine.engine import Engine
    from rellax_ds.engine.processes import start_processes

    recipe, prompts = setting.recipe, Prompts(setting)

    def make() -> tuple[ReLLaX, list[ParameterGroup]]:
        model = ours(recipe, prompts)
        return model, parameter_groups(model, recipe.train)

    processes = start_processes()
    torch.set_num_threads(setting.threads)
    engine = Engine(make, recipe.train, resolve_ds_config(recipe.train, 1), processes)
    for step, batches in enumerate(our_batches(setting, prompts, recipe, turns)):
        for number, batch in enumerate(batches):
            turns.losses.append(engine.accumulate(batch, recipe.seed, step, number))
        engine.outcome()


def resident(model: Any) -> Any:
    """The model with every weight in memory; a mapped page counts only once it has been read."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    return model


def parameter_groups(model: ReLLaX, train: TrainConfig) -> list[ParameterGroup]:
    """The recipe's learning rates by group of parameters."""
    from rellax_ds.engine.engine import ParameterGroup
    from rellax_ds.model.rellax import trainable_groups

    return [
        ParameterGroup(
            name,
            parameters,
            train.learning_rate if name == "factors" else train.interaction_learning_rate,
            train.weight_decay,
        )
        for name, parameters in trainable_groups(model).items()
    ]


def our_batches(
    setting: Setting, prompts: Prompts, recipe: Recipe, turns: Turns
) -> Iterator[list[Batch]]:
    """Collated micro-batches step by step; each step's are made before its turn begins."""
    weight = recipe.train.history_weight
    collate = Collator(prompts.index, weight)
    for step in range(setting.steps):
        batches = [collate(b) for b in prompts.step(step, recipe.model.spa)]
        turns.wait()
        yield batches
    turns.wait()


def without_conditions(recipe: Recipe) -> Recipe:
    """The recipe as plain LoRA: M = I, no soft tokens."""
    model = recipe.model.model_copy(update={"interaction": "identity", "spa": False})
    return recipe.model_copy(update={"model": model})


def ours(recipe: Recipe, prompts: Prompts) -> ReLLaX:
    """Our model as stage 6 builds it."""
    from rellax_ds.model.rellax import build_rellax

    runtime.seed_everything(recipe.seed, "model")
    yes, no = prompts.index.answer_ids
    return build_rellax(
        resolve_model(recipe.model.backbone).reference,
        recipe.model,
        {"yes": yes, "no": no},
        prompts.index.item_width,
        prompts.index.instance_width,
        loss=recipe.train.loss,
    )


def peft_lora(recipe: Recipe) -> Any:
    """The backbone with PEFT's LoRA at the recipe's rank, scale, dropout and modules."""
    import peft
    from transformers import AutoModelForCausalLM

    runtime.seed_everything(recipe.seed, "model")
    reference = resolve_model(recipe.model.backbone).reference
    base = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.model.rank,
        lora_alpha=recipe.model.alpha,
        lora_dropout=recipe.model.dropout,
        target_modules=list(recipe.model.target_modules),
    )
    return peft.get_peft_model(base, config)


def run_trainer(setting: Setting, turns: Turns, scratch: Path, answers_only: bool) -> None:
    """`Trainer` over the same micro-batches in the same order."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments
    from transformers import Trainer as HFTrainer

    class Answers(HFTrainer):  # type: ignore[misc]
        """Logits where there is a label, and nowhere else."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return answer_loss(model, inputs, kwargs["num_items_in_batch"])

    class OnTurn(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            turns.wait()

    train, prompts = setting.recipe.train, Prompts(setting)
    samples = itertools.chain.from_iterable(
        batch for step in range(setting.steps) for batch in prompts.step(step, slots=False)
    )
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=train.global_batch // train.micro_batch,
        max_steps=setting.steps,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=setting.recipe.seed,
    )
    trainer = (Answers if answers_only else HFTrainer)(
        model=resident(peft_lora(setting.recipe)),
        args=arguments,
        train_dataset=[features(sample, prompts.answer(sample)) for sample in samples],
        data_collator=stock_collator(setting.recipe),
        callbacks=[OnTurn()],
    )
    trainer.remove_callback(PrinterCallback)
    turns.losses.append(float(trainer.train().training_loss))


def stock_collator(recipe: Recipe) -> Any:
    """The collator of the examples of transformers: pads ids, mask and labels to the longest."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    reference = resolve_model(recipe.model.backbone).reference
    return DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(reference), padding=True)


def answer_loss(model: Any, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
    """Sum of the answers' cross entropies over `num_items`, from logits at their positions only."""
    rows, positions = torch.nonzero(inputs["labels"] != IGNORED, as_tuple=True)
    kept, place = torch.unique(positions - 1, return_inverse=True)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_to_keep=kept,
    ).logits[rows, place]
    words = inputs["labels"][rows, positions]
    return torch.nn.functional.cross_entropy(logits.float(), words, reduction="sum") / num_items


def _status(field: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")

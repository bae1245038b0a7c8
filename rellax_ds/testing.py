"""Small made-up inputs for tests, ours and users': tables, a recommender, an LLM, a whole recipe.

Nothing here is noise alone: the tables hold the planted log of `made_logs`, and the random models
have real formats, so that a test runs the code a user runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from rellax_ds.artifacts import write_json
from rellax_ds.config import DataConfig
from rellax_ds.made_logs import THINGS, WORDS
from rellax_ds.made_logs import write_movielens_100k as write_movielens_100k
from rellax_ds.tables import movielens, split

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.tables import Tables


def made_tables(
    folder: Path,
    *,
    config: DataConfig | None = None,
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1500,
    seed: int = 0,
) -> Tables:
    """The canonical tables of a made-up log, through the real reader and the real split.

    Args:
        folder: Where the raw files go.
        config: The recipe's data section; by default as shipped.
        num_users: See `write_movielens_100k`.
        num_items: See `write_movielens_100k`.
        num_events: See `write_movielens_100k`.
        seed: See `write_movielens_100k`.
    """
    write_movielens_100k(
        folder, num_users=num_users, num_items=num_items, num_events=num_events, seed=seed
    )
    return split.build_tables(movielens.read(folder), config or DataConfig())


def made_recommender(
    folder: Path, tables: Tables, *, item_width: int = 6, instance_width: int = 5, seed: int = 0
) -> Path:
    """Made-up outputs of a recommender in stage 4's form, without training one.

    Random rows; the last item counts as unseen and the last unit of h is dead in training.

    Args:
        folder: Where to write; created if absent.
        tables: What it would have been trained on.
        item_width: E.
        instance_width: H.
        seed: Everything random follows from it.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    item_table = rng.normal(3.0, 2.0, (tables.items.num_rows + 1, item_width)).astype(np.float32)
    item_table[0] = item_table[-1] = 0.0
    instances = rng.normal(1.0, 3.0, (tables.samples.num_rows, instance_width)).astype(np.float32)
    train = tables.samples.column("split").to_numpy() == 0
    instances[train, -1] = 0.0
    np.save(folder / "item_table.npy", item_table)
    np.save(folder / "instances.npy", instances)
    np.save(folder / "logits.npy", instances[:, 0])
    first_held_out = int(np.flatnonzero(train)[int(train.sum() * 0.75)])
    write_json(folder / "metrics.json", {"holdout_start": first_held_out})
    return folder


def tiny_tokenizer(folder: Path) -> Path:
    """A small byte-level BPE tokenizer with a chat template, saved as `from_pretrained` reads it.

    Any text can be encoded; digits stand alone; `Yes`, `No`, ` Yes` and ` No` are one token each;
    `<|im_start|>`, `<|im_end|>` and `<|endoftext|>` are special, as in SmolLM2.

    Args:
        folder: Where to write; created if absent. Other files of a model may lie there.

    Returns:
        `folder`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    titles = [f"The {word} {thing}?" for word in WORDS for thing in THINGS]
    wording = ["Does this viewer like", "Will the candidate be liked", "Ratings so far", "(1990)"]
    bpe.train_from_iterator([*titles, *wording * 20, *["Yes No Yes", "No Yes No"] * 50], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def tiny_causal_lm(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Llama of 32 dimensions with `tiny_tokenizer`, saved as models are.

    Args:
        folder: Where to write; created if absent.
        seed: Seed of the weights.

    Returns:
        `folder`.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(folder))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """A whole run in miniature: a made-up log, a random LLM and a recipe that names both.

    Args:
        folder: Where the log, the model and `tiny.yaml` go.
        sections: Changes to the recipe, by section.

    Returns:
        Path of the recipe.
    """
    backbone = tiny_causal_lm(folder / "llm")
    data = write_movielens_100k(folder / "raw")
    document: dict[str, dict[str, Any]] = {
        "data": {"path": str(data)},
        "embeddings": {"encoder": "backbone", "partition_rows": 32},
        "retrieval": {"num_retrieved": 12, "partition_rows": 500, "heterogeneity_at": [5, 10]},
        "crm": {"embedding_dim": 8, "hidden_dim": 16, "max_epochs": 2, "history_length": 10},
        "shards": {"train_rows": 48, "valid_rows": 32, "test_rows": 40, "samples_per_shard": 16},
        "model": {"backbone": str(backbone), "rank": 4, "interaction_hidden": 8},
        "train": {"num_processes": 2, "global_batch": 8, "micro_batch": 4, "eval_every": 3},
        "predict": {"partition_rows": 20, "bootstrap": 200},
    }
    for name, changes in sections.items():
        document[name] = {**document.get(name, {}), **changes}
    path = folder / "tiny.yaml"
    text = yaml.safe_dump({"description": "a run in miniature", **document}, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path

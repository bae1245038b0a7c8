"""Small made-up data for tests, ours and users': the formats are real, the content is planted.

MovieLens rows may not be shipped, and a test on noise proves little. So the makers here write files
in the data set's own formats with a signal a recommender can find (every user likes some genres)
and with the traps of the real files (ids with gaps, same-second ties, quotes, commas and brackets
in titles).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

from rellax_ds.artifacts import write_json
from rellax_ds.config import DataConfig
from rellax_ds.tables import movielens, split

if TYPE_CHECKING:
    from pathlib import Path

    from rellax_ds.tables import Tables

_ODD_TITLES = (
    'The "Quoted" Night',
    "Comma, the Return, The",
    "Rated (3 stars)",
    "Amélie à Nîmes",
    "Don't Look [Back]",
    "Ends with Yes",
)
_WORDS = ("Silent", "Crimson", "Lost", "Second", "Northern", "Paper", "Golden", "Last")
_THINGS = ("Harbour", "Letter", "Garden", "Station", "Winter", "Orchard", "Mirror", "Bridge")
_OCCUPATIONS = ("student", "engineer", "librarian", "other", "writer")
_EPOCH = 880_000_000
_GENRES = movielens.GENRES[1:9]

_User = tuple[int, int, str, str, str]
_Item = tuple[int, str, int, list[int]]


def write_movielens_100k(
    folder: Path,
    *,
    num_users: int = 40,
    num_items: int = 60,
    num_events: int = 1500,
    seed: int = 0,
    layout: Literal["atomic", "official"] = "atomic",
) -> Path:
    """Write a made-up log in ML-100K's file formats.

    A user likes about half of eight genres: items whose first genre is liked get 4 or 5 stars most
    of the time, the others 1 to 3. Both layouts hold the same log.

    Args:
        folder: Where to write; created if absent.
        num_users: Users, with odd ids from 1.
        num_items: Items, with ids 1, 4, 7, ...
        num_events: Ratings; every (user, item) pair at most once, spread evenly over users.
        seed: Everything random follows from it.
        layout: `atomic` for `ml-100k.inter/.item/.user` with headers, `official` for
            `u.data/u.item/u.user`.

    Returns:
        `folder`.

    Raises:
        ValueError: There are fewer (user, item) pairs than events.
    """
    if num_events > num_users * num_items:
        raise ValueError(
            f"num_events {num_events} is more than {num_users} users x {num_items} items"
        )
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    first_genre = rng.integers(len(_GENRES), size=num_items)
    second_genre = rng.integers(len(_GENRES), size=num_items)
    likes = rng.random((num_users, len(_GENRES))) < 0.5

    per_user = np.full(num_users, num_events // num_users)
    per_user[: num_events % num_users] += 1
    user = np.repeat(np.arange(num_users), per_user)
    item = np.concatenate([rng.permutation(num_items)[:count] for count in per_user])
    # The smaller flag is the first genre, as in the real file.
    leading = np.minimum(first_genre, second_genre)
    centre = np.where(likes[user, leading[item]], 4.4, 2.2)
    rating = np.clip(np.rint(rng.normal(centre, 0.7)), 1, 5).astype(np.int64)
    start = _EPOCH + rng.integers(0, 2_000_000, size=num_users)
    # Steps of 0 seconds make ties; the rare long pause makes sessions.
    steps = rng.choice([0, 0, 13, 41, 90_000], p=[0.25, 0.2, 0.3, 0.2, 0.05], size=user.size)
    elapsed = np.cumsum(steps)
    first_row = np.cumsum(per_user) - per_user
    time = start[user] + elapsed - elapsed[first_row][user]

    items: list[_Item] = [
        (3 * i + 1, _title(i), 1990 + i % 9, sorted({int(first_genre[i]), int(second_genre[i])}))
        for i in range(num_items)
    ]
    users: list[_User] = [
        (
            2 * u + 1,
            int(rng.integers(12, 70)),
            "MF"[int(rng.integers(2))],
            _OCCUPATIONS[int(rng.integers(len(_OCCUPATIONS)))],
            f"{int(rng.integers(100_000)):05d}",
        )
        for u in range(num_users)
    ]
    order = rng.permutation(user.size)
    events = zip(2 * user[order] + 1, 3 * item[order] + 1, rating[order], time[order], strict=True)
    rows = ["\t".join(str(value) for value in event) for event in events]
    if layout == "atomic":
        _write_atomic(folder, users, items, rows)
    else:
        _write_official(folder, users, items, rows)
    return folder


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
    titles = [f"The {word} {thing}?" for word in _WORDS for thing in _THINGS]
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


_HEADERS = {
    "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
}


def _write_atomic(folder: Path, users: list[_User], items: list[_Item], rows: list[str]) -> None:
    _write(folder / "ml-100k.inter", [_HEADERS["inter"], *rows])
    item_rows = [
        f"{i}\t{title}\t{year}\t{' '.join(_GENRES[g] for g in flags)}"
        for i, title, year, flags in items
    ]
    _write(folder / "ml-100k.item", [_HEADERS["item"], *item_rows])
    user_rows = ["\t".join(str(value) for value in row) for row in users]
    _write(folder / "ml-100k.user", [_HEADERS["user"], *user_rows])


def _write_official(folder: Path, users: list[_User], items: list[_Item], rows: list[str]) -> None:
    _write(folder / "u.data", rows)
    item_rows = [
        f"{i}|{title} ({year})|01-Jan-{year}||http://example.invalid/{i}|{_flags(flags)}"
        for i, title, year, flags in items
    ]
    _write(folder / "u.item", item_rows, encoding="latin-1")
    _write(folder / "u.user", ["|".join(str(value) for value in row) for row in users])


def _title(i: int) -> str:
    if i < len(_ODD_TITLES):
        return _ODD_TITLES[i]
    return f"{_WORDS[i % 8]} {_THINGS[i // 8 % 8]}" + (f" {i // 64 + 1}" if i >= 64 else "")


def _flags(positions: list[int]) -> str:
    # Genre 0 of the file is `unknown`, which the makers never set.
    marked = {position + 1 for position in positions}
    return "|".join("1" if n in marked else "0" for n in range(len(movielens.GENRES)))


def _write(path: Path, rows: list[str], encoding: str = "utf-8") -> None:
    path.write_bytes(("\n".join(rows) + "\n").encode(encoding))

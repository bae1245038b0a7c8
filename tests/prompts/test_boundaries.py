"""Ids equal the tokenizer's own on the rendered text, for every family of tokenizers."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from rellax_ds.assets import resolve_model
from rellax_ds.errors import AssetError
from rellax_ds.prompts.render import History, PromptBuilder
from rellax_ds.prompts.templates import Template, load_template
from rellax_ds.prompts.tokens import PromptTokens, load_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

SLOT = "<slot>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = (
    "<s>{% for message in messages %}USER: {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
MARKED = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TITLES = [
    "Rated (3 stars) (1994)",
    'Did He Say "Yes"? No: ***Yes*** (1990)',
    "Seventh Seal, The (Sjunde inseglet, Det) (1957)",
    "Amélie à Nîmes (2001)",
    "12 Monkeys (1995)",
    "¿Qué?",
    "...And Justice",
    "東京物語 (1953)",
    "Plain Harbour (1992)",
    "Ends with Yes",
    "(500) Days",
    "7",
]
USERS: dict[str, list[str | None]] = {
    "gender": ["male", "female", "male"],
    "age": ["25-34", None, "under 18"],
    "occupation": ["writer", "student", "writer"],
}
# The seams of this template lie inside words and numbers, where no tokenizer parts a text.
SEAMS = Template(
    "seams",
    history="No{index}{title}{rating}{soft}th,{answer}s\n",
    target="Now {title}{soft}th,",
    yes=" Yes",
    no=" No",
    profile="{gender}{age}",
    lead_in="rated:",
)
WORDS = [
    *TITLES,
    "Viewer: male, 25-34, writer.\nRatings so far, oldest first, out of 5:\n1) A: 4\n10) B: 3.5\n",
    "Candidate: A\nA rating above 3 counts as liking it. Will this viewer like the candidate?",
    "Reply Yes or No.\nAnswer: Yes\nAnswer: No\n",
    "Does this viewer like these films?\nA? Yes\nB? No\n",
    "['0. A (4 stars) ', '1. B (1 star) ']\nNote that ONLY USER: A ASSISTANT: Yes ASSISTANT: No",
    "th, Yes th, No USER: ASSISTANT: Yes No No1Rated. Yess",
]
# One word a time, so that no merge spans two words even where nothing splits the text.
CORPUS = [word for text in WORDS for word in re.findall(r" ?\S+|\n", text)]
CORPUS = [*CORPUS, *map(str.strip, CORPUS), *["Yes", "No", " Yes", " No"] * 20] * 10


def bpe(**parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=parts.pop("byte_fallback", False)))
    alphabet = parts.pop("alphabet", [])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(split: pre.PreTokenizer | None = None, use_regex: bool = True) -> Tokenizer:
    byte = pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return bpe(
        pre_tokenizer=byte if split is None else pre.Sequence([split, byte]),
        decoder=decoders.ByteLevel(),
        alphabet=sorted(pre.ByteLevel.alphabet()),
    )


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator([*CORPUS, *"".join(WORDS)], trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "smollm": lambda: byte_level(pre.Digits(individual_digits=True)),
    "llama3": lambda: byte_level(pre.Split(Regex(LLAMA3), "isolated"), use_regex=False),
    "unsplit-bytes": lambda: byte_level(use_regex=False),
    "metaspace-first": lambda: bpe(
        byte_fallback=True, pre_tokenizer=pre.Metaspace(prepend_scheme="first")
    ),
    "metaspace-always": lambda: bpe(
        byte_fallback=True, pre_tokenizer=pre.Metaspace(prepend_scheme="always")
    ),
    "llama2-legacy": lambda: bpe(
        byte_fallback=True,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    ),
    "unigram": unigram,
    "wordpiece": word_piece,
}


@functools.cache
def family(name: str, template: str | None = None) -> tuple[PromptTokens, Any]:
    """Tokens of a family, and the same tokenizer with the slot as a token of its own."""

    def make() -> Any:
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend(name), bos_token="<s>", eos_token="</s>"
        )
        made.chat_template = template
        return made

    oracle = make()
    oracle.add_special_tokens({"additional_special_tokens": [AddedToken(SLOT, special=True)]})
    return PromptTokens(make(), name), oracle


@functools.cache
def _trained(name: str) -> str:
    return str(FAMILIES[name]().to_str())


def backend(name: str) -> Tokenizer:
    return Tokenizer.from_str(_trained(name))


def builder(
    tokens: PromptTokens, template: Template, titles: list[str] | None = None, **changes: Any
) -> PromptBuilder:
    values = {"chat": False, "soft_slots": True, "max_tokens": 1 << 20} | changes
    constants = {"like_rule": "above 3", "max_rating": "5"}
    return PromptBuilder(template, tokens, {"title": titles or TITLES}, USERS, constants, **values)


def check_equal(made: PromptBuilder, oracle: Any, user: int, item: int, history: History) -> None:
    """The prompt's ids are those of its whole text, with the slots as tokens in it."""
    text = SLOT.join(made.render(user, item, history))
    expected = np.array(oracle(text, add_special_tokens=not made.wrapped).input_ids)
    expected[expected == oracle.convert_tokens_to_ids(SLOT)] = made.tokens.slot_id
    assert made.build(user, item, 1, history).input_ids.tolist() == expected.tolist()


def some_history(size: int, count: int = len(TITLES), shift: int = 0) -> History:
    rng = np.random.default_rng(size + shift)
    return History(
        (np.arange(size) + shift) % count,
        rng.choice([0.5, 1, 3, 3.5, 5], size),
        rng.integers(0, 2, size),
        np.arange(size),
    )


TEMPLATES = {
    name: load_template(name) for name in ("plain", "question_answer", "vicuna_compat")
} | {"seams": SEAMS}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_the_tokenizers_own_on_the_whole_text(name: str, template: str) -> None:
    tokens, oracle = family(name)
    made = builder(tokens, TEMPLATES[template])
    for size in (0, 1, 12):
        for user in range(3):
            check_equal(made, oracle, user, 8 - user, some_history(size))
    for shift in range(len(TITLES)):
        check_equal(made, oracle, 0, shift, some_history(5, shift=shift))


@pytest.mark.parametrize(
    ("name", "chat"),
    [
        ("gpt2", MARKED),
        ("llama3", MARKED),
        ("llama3", CHAT),
        ("metaspace-first", CHAT),
        ("metaspace-always", CHAT),
        ("llama2-legacy", CHAT),
        ("unigram", CHAT),
    ],
)
def test_ids_in_a_chat_wrapper_are_the_tokenizers_own(name: str, chat: str) -> None:
    tokens, oracle = family(name, chat)
    made = builder(tokens, TEMPLATES["plain"], chat=True)
    assert made.wrapped
    check_equal(made, oracle, 0, 8, some_history(3))
    check_equal(made, oracle, 1, 3, some_history(0))


@pytest.mark.parametrize(
    ("name", "template", "verdict"),
    [
        ("gpt2", "plain", "exact"),
        ("smollm", "plain", "exact"),
        ("smollm", "question_answer", "exact"),
        ("llama3", "question_answer", "exact"),
        ("gpt2", "seams", "joined"),
        ("metaspace-first", "plain", "joined"),
        ("unigram", "question_answer", "joined"),
    ],
)
def test_seams_that_the_tokenizer_joins_are_reported(
    name: str, template: str, verdict: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rellax_ds"):
        assert builder(family(name)[0], TEMPLATES[template]).boundaries == verdict
    assert ("tokenised together" in caplog.text) == (verdict == "joined")


def test_cuts_of_one_builder_serve_another_without_asking_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens, oracle = family("unigram")
    first = builder(tokens, SEAMS)
    caplog.clear()  # the first builder asked, and says so where another test set the log's level
    with caplog.at_level(logging.INFO, "rellax_ds"):
        second = builder(tokens, SEAMS, cuts=first.cuts)
    said = [record.message for record in caplog.records if record.name.startswith("rellax_ds")]
    assert not said  # threads of other libraries may speak meanwhile
    assert second.boundaries == first.boundaries
    check_equal(second, oracle, 0, 8, some_history(4))


def test_text_cut_where_the_tokenizer_joins_would_differ() -> None:
    """The guard itself: with every seam cut, the ids are others."""
    tokens, _ = family("gpt2")
    made = builder(tokens, SEAMS)
    everywhere = {name: [True] * len(row) for name, row in made.cuts.items()}
    cut = builder(tokens, SEAMS, cuts=everywhere)
    history = some_history(5)
    assert (
        made.build(0, 8, 1, history).input_ids.tolist()
        != cut.build(0, 8, 1, history).input_ids.tolist()
    )


@pytest.mark.parametrize("name", ["gpt2", "unigram"])
def test_answers_inside_a_joined_unit_keep_their_places(name: str) -> None:
    tokens, _ = family(name)
    made = builder(tokens, TEMPLATES["question_answer"])
    assert made.history_supervised
    history = some_history(6)
    prompt = made.build(0, 8, 1, history)
    places = np.flatnonzero(prompt.answers >= 0)
    assert prompt.answers[places].tolist() == [*history.labels, 1]
    ids = (made.answer_ids.no, made.answer_ids.yes)
    assert prompt.input_ids[places[:-1] + 1].tolist() == [ids[n] for n in history.labels]


odd = st.text(
    st.one_of(
        st.sampled_from(list(" \n\t()[]{}'\"!?.,:;-_*#~▁0129aZéñ")),
        st.characters(exclude_categories=("Cs", "Cn", "Cc")),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=30)
@given(
    titles=st.lists(odd, min_size=3, max_size=5),
    name=st.sampled_from(["gpt2", "smollm", "llama3", "metaspace-first", "llama2-legacy"]),
    template=st.sampled_from(list(TEMPLATES)),
)
def test_odd_titles_keep_the_ids_equal(titles: list[str], name: str, template: str) -> None:
    tokens, oracle = family(name)
    made = builder(tokens, TEMPLATES[template], titles)
    check_equal(made, oracle, 0, 0, some_history(4, len(titles)))
    check_equal(made, oracle, 1, 1, some_history(0, len(titles)))


@functools.cache
def cuts_of(name: str, template: str) -> Any:
    return builder(family(name)[0], TEMPLATES[template]).cuts


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_batch_equals_its_prompts_one_by_one(data: st.DataObject) -> None:
    from rellax_ds.prompts.assemble import Histories, offsets_of

    name = data.draw(st.sampled_from(["smollm", "unigram"]))
    template = data.draw(st.sampled_from(["plain", "question_answer", "seams"]))
    limit = data.draw(st.integers(60, 400))
    cuts = cuts_of(name, template)
    made = builder(family(name)[0], TEMPLATES[template], max_tokens=limit, cuts=cuts)
    sizes = np.array(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    total, count = int(sizes.sum()), len(sizes)
    items, ratings = rng.integers(0, len(TITLES), total), rng.choice([1.0, 3.5, 5.0], total)
    labels, offsets = rng.integers(0, 2, total), offsets_of(sizes)
    ranks = [rng.permutation(size) for size in sizes]
    users, targets = rng.integers(0, 3, count), rng.integers(0, len(TITLES), count)
    answers = rng.integers(0, 2, count)
    batch = made.build_batch(
        users, targets, answers, Histories(offsets, items, ratings, labels, np.concatenate(ranks))
    )
    for n in range(count):
        part = slice(offsets[n], offsets[n + 1])
        order = np.argsort(ranks[n])
        history = History(items[part], ratings[part], labels[part], order)
        one = made.build(int(users[n]), int(targets[n]), int(answers[n]), history)
        place = slice(batch.offsets[n], batch.offsets[n + 1])
        for column in ("input_ids", "slot_items", "answers"):
            assert getattr(batch, column)[place].tolist() == getattr(one, column).tolist()
        assert tuple(np.flatnonzero(batch.kept[part])) == one.kept
        assert batch.clipped[n] == one.clipped
        if one.kept or not sizes[n]:
            continue
        assert len(one.input_ids) <= limit


@pytest.mark.assets
@pytest.mark.parametrize(
    ("template", "chat"),
    [("plain", True), ("question_answer", True), ("vicuna_compat", False), ("seams", False)],
)
def test_smollm2_ids_are_its_own_on_the_whole_text(template: str, chat: bool) -> None:
    try:
        reference = resolve_model("smollm2-135m-instruct").reference
    except AssetError as error:
        pytest.skip(str(error))
    tokens = load_tokens(reference)
    oracle = load_tokens(reference)._tokenizer
    oracle.add_special_tokens({"additional_special_tokens": [AddedToken(SLOT, special=True)]})
    made = builder(tokens, TEMPLATES[template], chat=chat)
    if template in ("plain", "question_answer"):
        assert made.boundaries == "exact"
    for shift in range(len(TITLES)):
        check_equal(made, oracle, shift % 3, shift, some_history(6, shift=shift))

"""The prompt builder: ids, soft-token slots and answer positions, recorded while it builds.

A prompt is a row of segments: the wrapper, the profile, the lead-in, one block a history item and
the question. Each segment is tokenised on its own and remembered (an item's text once per item),
so a prompt is put together from ids without calling the tokenizer. Leaving the slots out gives the
prompt of a run without soft tokens, id for id.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import runtime
from rellax_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from rellax_ds.prompts.templates import Piece, Template
    from rellax_ds.prompts.tokens import PromptTokens

_ARTICLES = frozenset(
    ("The", "A", "An", "La", "Le", "Les", "L'", "Il", "El", "Los", "Las", "Der", "Die", "Das")
)
_UNTITLED = "(untitled)"


@dataclass(frozen=True)
class History:
    """Behaviour a prompt may show, oldest first; K events.

    Attributes:
        items: Item rows [K].
        ratings: Ratings [K].
        labels: 1 for a like [K].
        drop_order: Positions 0..K-1 in the order they are given up when the prompt is too long.
    """

    items: Sequence[int] | npt.NDArray[Any]
    ratings: Sequence[float] | npt.NDArray[Any]
    labels: Sequence[int] | npt.NDArray[Any]
    drop_order: Sequence[int]


@dataclass(frozen=True)
class Prompt:
    """One prompt of L tokens.

    Attributes:
        input_ids: int32 [L].
        slot_items: int32 [L], item row at a soft-token slot, -1 elsewhere.
        answers: int32 [L], label where the next token is a supervised answer, -1 elsewhere; the
            last position is the target's question.
        kept: Positions of the history that the prompt shows.
        clipped: Tokens taken off the candidate's title because nothing else was left to drop.
    """

    input_ids: npt.NDArray[np.int32]
    slot_items: npt.NDArray[np.int32]
    answers: npt.NDArray[np.int32]
    kept: tuple[int, ...]
    clipped: int


class _Draft:
    """Three columns of a prompt under construction."""

    def __init__(self, ids: Sequence[int] = ()) -> None:
        self.ids: list[int] = list(ids)
        self.slots: list[tuple[int, int]] = []
        self.answers: list[tuple[int, int]] = []

    def finish(self, kept: tuple[int, ...], clipped: int) -> Prompt:
        slot_items = np.full(len(self.ids), -1, np.int32)
        answers = np.full(len(self.ids), -1, np.int32)
        for position, item in self.slots:
            slot_items[position] = item
        for position, label in self.answers:
            answers[position] = label
        return Prompt(np.asarray(self.ids, np.int32), slot_items, answers, kept, clipped)


class PromptBuilder:
    """Builds prompts from one template, one tokenizer and the text columns of the tables.

    Attributes:
        answer_ids: Ids of yes and no at the target's question.
        history_supervised: Whether the history holds answers with these very ids, so that the same
            two rows of the head can be trained on them.
        wrapped: Whether a chat template stands around the content.
        tokens: The tokenizer.
    """

    def __init__(
        self,
        template: Template,
        tokens: PromptTokens,
        items: Mapping[str, Sequence[str | None]],
        users: Mapping[str, Sequence[str | None]],
        constants: Mapping[str, str],
        *,
        chat: bool,
        soft_slots: bool,
        max_tokens: int,
    ) -> None:
        """Check the template against tables and tokenizer, and resolve the answers.

        Args:
            template: Wording.
            tokens: Tokenizer.
            items: Text columns of the item table; at least `title`.
            users: Text columns of the user table.
            constants: Fields with one value, for example `like_rule`.
            chat: Wrap the content in the tokenizer's chat template, if it has one.
            soft_slots: Whether soft tokens are placed.
            max_tokens: Longest prompt.

        Raises:
            ConfigError: A field has no column, or an answer is not one token.
        """
        self._template, self.tokens = template, tokens
        self._items, self._users, self._constants = items, users, dict(constants)
        self._soft, self._max_tokens = soft_slots, max_tokens
        self._wrapper = tokens.wrapper(chat)
        self.wrapped = wrapped = bool(self._wrapper.tail)
        self._profile = template.pieces("profile")
        self._lead_in = template.pieces("lead_in")
        self._history = template.pieces("history")
        self._question = template.question(wrapped)
        self._text_ids: dict[str, list[int]] = {}
        self._item_ids: dict[tuple[Piece, int], list[int]] = {}
        for key, pieces, columns in (
            ("profile", self._profile, users),
            ("lead_in", self._lead_in, {}),
            ("history", self._history, {**items, "name": ()}),
            ("target", self._question, {**items, "name": ()}),
        ):
            self._check_fields(key, pieces, [*columns, *constants])
        yes, no = template.yes, template.no
        if wrapped and not self._wrapper.blank:
            yes, no = yes.strip(), no.strip()
        tail = self._wrapper.tail if wrapped else self._question[-1].tail
        self.answer_ids = tokens.answers(tail, yes, no, control=wrapped)
        self._history_answers = (self.answer_ids.no, self.answer_ids.yes)
        self.history_supervised = False
        for before, piece in zip(self._history, self._history[1:], strict=False):
            if piece.kind == "answer":
                found = tokens.answers(before.tail, template.yes, template.no, control=False)
                self._history_answers = (found.no, found.yes)
                self.history_supervised = found == self.answer_ids

    def build(self, user: int, item: int, label: int, history: History) -> Prompt:
        """One prompt, shortened to `max_tokens` by dropping history items, never the question.

        Args:
            user: Row of the user table.
            item: Row of the candidate in the item table.
            label: 1 if the candidate was liked.
            history: Events before the candidate.

        Raises:
            ConfigError: Not even the question fits.
        """
        profile = self._profile_ids(user)
        size = len(history.items)

        def assemble(num_dropped: int, clip: int = 0) -> tuple[_Draft, tuple[int, ...]]:
            given_up = set(history.drop_order[:num_dropped])
            kept = tuple(n for n in range(size) if n not in given_up)
            draft = _Draft(self._wrapper.prefix)
            draft.ids += profile
            if kept:
                self._extend(draft, self._lead_in)
            for index, n in enumerate(kept, start=1):
                self._extend(
                    draft,
                    self._history,
                    int(history.items[n]),
                    index=index,
                    rating=float(history.ratings[n]),
                    label=int(history.labels[n]),
                )
            self._extend(draft, self._question, item, clip=clip)
            draft.ids += self._wrapper.suffix
            draft.answers.append((len(draft.ids) - 1, label))
            return draft, kept

        def fits(num_dropped: int) -> bool:
            return len(assemble(num_dropped)[0].ids) <= self._max_tokens

        draft, kept = assemble(0)
        if len(draft.ids) > self._max_tokens:
            num_dropped = bisect.bisect_left(range(1, size), True, key=fits) + 1
            draft, kept = assemble(min(num_dropped, size))
        clipped = max(0, len(draft.ids) - self._max_tokens)
        if clipped:
            runtime.logger.warning(
                "shards: the title of item %d loses %d tokens: shards.max_tokens %d holds no more",
                item,
                clipped,
                self._max_tokens,
            )
            draft, kept = assemble(size, clip=clipped)
        return draft.finish(kept, clipped)

    def _extend(
        self,
        draft: _Draft,
        pieces: Sequence[Piece],
        item: int = -1,
        *,
        index: int = 0,
        rating: float = 0.0,
        label: int = 0,
        clip: int = 0,
    ) -> None:
        ids = draft.ids
        for piece in pieces:
            if piece.kind == "text":
                text = self._item_text_ids(piece, item)
                if clip and piece.fields:
                    text = self._clip(text, clip)
                    clip = 0
                ids += text
            elif piece.kind == "soft":
                if self._soft:
                    draft.slots.append((len(ids), item))
                    ids.append(self.tokens.slot_id)
            elif piece.kind == "answer":
                if self.history_supervised:
                    draft.answers.append((len(ids) - 1, label))
                ids.append(self._history_answers[label])
            else:
                value = str(index) if piece.kind == "index" else f"{rating:g}"
                blanks = piece.parts[0][0] if piece.parts else ""
                ids += self._ids(blanks + value)

    def _clip(self, text: list[int], count: int) -> list[int]:
        if count >= len(text):
            raise ConfigError(
                f"shards.max_tokens {self._max_tokens} does not hold the question without any"
                f" history; it needs at least {count - len(text) + 1} more"
            )
        return text[: len(text) - count]

    def _ids(self, text: str) -> list[int]:
        found = self._text_ids.get(text)
        if found is None:
            found = self._text_ids[text] = self.tokens.content(text)
        return found

    def _item_text_ids(self, piece: Piece, item: int) -> list[int]:
        found = self._item_ids.get((piece, item))
        if found is None:
            text = "".join(
                literal if name is None else self._item_field(name, item)
                for literal, name in piece.parts
            )
            found = self._item_ids[piece, item] = self._ids(text)
        return found

    def _item_field(self, name: str, item: int) -> str:
        if name in self._constants:
            return self._constants[name]
        title = " ".join((self._items["title"][item] or "").split()) or _UNTITLED
        if name == "title":
            return title
        if name == "name":
            return display_name(title)
        return " ".join((self._items[name][item] or "").split())

    def _profile_ids(self, user: int) -> list[int]:
        ids: list[int] = []
        for piece in self._profile:
            texts = []
            for literal, name in piece.parts:
                if name is None:
                    texts.append(literal)
                elif name in self._constants:
                    texts.append(self._constants[name])
                else:
                    value = " ".join((self._users[name][user] or "").split())
                    if not value:
                        return []
                    texts.append(value)
            ids += self._ids("".join(texts))
        return ids

    def _check_fields(self, key: str, pieces: Sequence[Piece], known: Sequence[str]) -> None:
        for piece in pieces:
            for name in piece.fields:
                if name in known:
                    continue
                if key == "profile":
                    runtime.logger.warning(
                        "shards: no profile line, the user table has no column '%s'", name
                    )
                    self._profile = ()
                    return
                raise ConfigError(
                    f"template {self._template.name}: '{key}' names {{{name}}}, which is no"
                    f" column; choose among {', '.join(known)}"
                )


def display_name(title: str) -> str:
    """A title in reading order: without year and other-language title, article in front.

    `Seventh Seal, The (Sjunde inseglet, Det) (1957)` is `The Seventh Seal`: what a language model
    has read elsewhere, in half the tokens. A title made of brackets alone stays as it is.
    """
    name = title
    while name.endswith(")"):
        start = _opening_bracket(name)
        if start < 1 or name[start - 1] != " ":
            break
        name = name[:start].rstrip()
    head, comma, last = name.rpartition(", ")
    if comma and last in _ARTICLES:
        name = f"{last}{'' if last.endswith(chr(39)) else ' '}{head}"
    return name or title


def _opening_bracket(text: str) -> int:
    """Position of the bracket that the last character closes, -1 if there is none."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += (text[position] == ")") - (text[position] == "(")
        if depth == 0:
            return position
    return -1

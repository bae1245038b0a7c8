"""Spans: the text between two soft tokens, as units whose ids are remembered by what they show.

A soft token ends a span, so the text of a prompt falls into five kinds of them: `open` up to the
first history item's slot, `mid` from slot to slot, `ask` from the last item's slot to the
candidate's, `bare` up to the candidate's slot when no history is shown, and `close` behind it. A
span is a row of template pieces. Every piece is a unit of its own where the tokenizer is known to
part it from its neighbours (`boundaries`), else the span is one; and a unit is tokenised once for
every combination of values it shows: once an item, once a rating, once an index. What a span's ids
are is therefore the tokenizer's own doing; how often it is asked is ours.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rellax_ds.prompts.assemble import TokenTable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from rellax_ds.prompts.assemble import Ints
    from rellax_ds.prompts.templates import Piece, Template
    from rellax_ds.prompts.tokens import PromptTokens, Wrapper

Name = Literal["open", "mid", "ask", "bare", "close"]
NAMES: tuple[Name, ...] = ("open", "mid", "ask", "bare", "close")

Cuts = dict[str, list[bool]]
"""For every kind of span, whether each junction of neighbouring parts is a cut."""

_ARTICLES = frozenset(
    ("The", "A", "An", "La", "Le", "Les", "L'", "Il", "El", "Los", "Las", "Der", "Die", "Das")
)
_UNTITLED = "(untitled)"


@dataclass(frozen=True)
class Part:
    """One piece of a span and where its values come from.

    Attributes:
        kind: The piece's kind; `profile` for the line about the user, `control` for ids that are
            no content and join with nothing.
        parts: As in `Piece`.
        column: Name of the number it depends on; empty when it always reads the same.
        example: A text that may end it, as context for what follows.
        ids: Of `control`.
    """

    kind: str
    parts: tuple[tuple[str, str | None], ...] = ()
    column: str = ""
    example: str = ""
    ids: tuple[int, ...] = ()

    @property
    def titled(self) -> bool:
        """Whether it shows an item's text, which may be shortened."""
        return self.kind == "text" and self.column.endswith("item")


class Wording:
    """Numbers to text: items, profiles, ratings and answers as the template words them.

    Attributes:
        num_items: Rows of the item table.
        num_users: Rows of the user table.
    """

    def __init__(
        self,
        template: Template,
        profile: Sequence[Piece],
        items: Mapping[str, Sequence[str | None]],
        users: Mapping[str, Sequence[str | None]],
        constants: Mapping[str, str],
    ) -> None:
        self._answers = (template.no, template.yes)
        self._profile, self._items, self._users = profile, items, users
        self._constants = constants
        self.num_items = len(items["title"])
        self.num_users = max((len(column) for column in users.values()), default=0)
        self._profile_texts = {"": 0}
        self._profile_list = [""]
        self._profile_of = np.full(self.num_users + 1, -1, np.int64)
        self._ratings: dict[float, int] = {}

    def profile_numbers(self, users: npt.NDArray[Any]) -> Ints:
        """Users with the same profile line get the same number, 0 for an empty one [N]."""
        if not self._profile:
            return np.zeros(len(users), np.int64)
        for user in np.unique(users[self._profile_of[users] < 0]).tolist():
            text = self._profile_text(user)
            if text not in self._profile_texts:
                self._profile_texts[text] = len(self._profile_list)
                self._profile_list.append(text)
            self._profile_of[user] = self._profile_texts[text]
        numbers: Ints = self._profile_of[users]
        return numbers

    def rating_numbers(self, ratings: npt.NDArray[Any]) -> Ints:
        """Equal ratings get the same number [M]."""
        unique, inverse = np.unique(ratings, return_inverse=True)
        known = self._ratings
        numbers = [known.setdefault(float(value), len(known)) for value in unique]
        return np.array(numbers, np.int64)[inverse]

    def text(self, part: Part, value: int) -> str:
        """Text of a part for a number of its column."""
        if part.kind == "profile":
            return self._profile_list[value]
        if part.kind == "text":
            return "".join(
                literal if name is None else self._item_field(name, value)
                for literal, name in part.parts
            )
        if part.kind == "answer":
            return self._answers[value]
        blanks = part.parts[0][0] if part.parts else ""
        if part.kind in ("index", "index0"):
            return f"{blanks}{value - (part.kind == 'index0')}"
        rating = next(known for known, number in self._ratings.items() if number == value)
        if part.kind == "stars":
            return f"{blanks}{'star' if rating <= 1 else 'stars'}"
        return f"{blanks}{rating:g}"

    def _item_field(self, name: str, item: int) -> str:
        if name in self._constants:
            return self._constants[name]
        title = " ".join((self._items["title"][item] or "").split()) or _UNTITLED
        if name == "title":
            return title
        if name == "name":
            return display_name(title)
        if name in ("quote", "quoted"):
            return repr(title)[0] if name == "quote" else repr(title)[1:-1]
        return " ".join((self._items[name][item] or "").split())

    def _profile_text(self, user: int) -> str:
        texts = []
        for piece in self._profile:
            for literal, name in piece.parts:
                if name is None:
                    texts.append(literal)
                elif name in self._constants:
                    texts.append(self._constants[name])
                else:
                    value = " ".join((self._users[name][user] or "").split())
                    if not value:
                        return ""
                    texts.append(value)
        return "".join(texts)


def span_parts(
    template: Template,
    wrapper: Wrapper,
    profile: bool,
    question: Sequence[Piece],
    constants: Collection[str],
) -> dict[Name, tuple[Part, ...]]:
    """The parts of every kind of span.

    Args:
        template: Wording.
        wrapper: What stands around the content.
        profile: Whether prompts open with a line about the user.
        question: `Template.question`.
        constants: Names of the fields that always read the same.
    """

    def parts(pieces: str | Sequence[Piece], source: str = "") -> list[Part]:
        found = template.pieces(pieces) if isinstance(pieces, str) else pieces
        return [_sourced(piece, source, template.yes, constants) for piece in found]

    line_head, line_tail = _at_slot(template.pieces("history"))
    ask_head, ask_tail = _at_slot(question)
    opening = [Part("control", ids=wrapper.opening), *_literal(wrapper.lead)]
    if not wrapper.tail:
        opening += parts("opening")
    if profile:
        tail = template.pieces("profile")[-1].tail or "a"
        opening.append(Part("profile", column="profile", example=tail))
    closing = [*_literal(wrapper.trail), Part("control", ids=wrapper.closing)]
    after_line = parts(line_tail, "before_")
    return {
        "open": (*opening, *parts("lead_in"), *parts(line_head)),
        "mid": (*after_line, *parts("between"), *parts(line_head)),
        "ask": (*after_line, *parts("lead_out"), *parts(ask_head)),
        "bare": (*opening, *parts(ask_head)),
        "close": (*parts(ask_tail, "before_"), *closing),
    }


class Unit:
    """Neighbouring parts of a span that are tokenised as one text.

    Attributes:
        parts: In order.
        columns: Names of the numbers its text depends on.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        before: str,
        start: bool,
        *,
        wording: Wording,
        tokens: PromptTokens,
        answers: tuple[int, int] | None,
    ) -> None:
        """Nothing is tokenised yet.

        Args:
            parts: Neighbouring parts.
            before: What may stand right before it in its span.
            start: Whether a prompt begins with it.
            wording: Numbers to text.
            tokens: Tokenizer.
            answers: Ids of no and yes if a history's answers are marked.
        """
        self.parts = tuple(parts)
        self.columns = tuple(dict.fromkeys(part.column for part in parts if part.column))
        self._before, self._start = before, start
        self._wording, self._tokens, self._answers = wording, tokens, answers
        self._answer = next((n for n, part in enumerate(parts) if part.kind == "answer"), None)
        self._dense = np.full(1, -1, np.int64)
        self._sparse: dict[tuple[int, ...], int] = {}

    def rows(self, values: Mapping[str, Ints], table: TokenTable) -> Ints:
        """Rows of the table for B occurrences; what is not in it yet is tokenised.

        Args:
            values: Column name to numbers [B].
            table: Where rows live.
        """
        keys = [values[name] for name in self.columns]
        if len(keys) > 1:
            return self._sparse_rows(np.stack(keys, axis=1), table)
        key = keys[0] if keys else np.zeros(len(next(iter(values.values()))), np.int64)
        highest = int(key.max(initial=0))
        if highest >= len(self._dense):
            grown = np.full(max(highest + 1, 2 * len(self._dense)), -1, np.int64)
            grown[: len(self._dense)] = self._dense
            self._dense = grown
        missing = np.unique(key[self._dense[key] < 0])
        if len(missing):
            self._dense[missing] = self._append(missing[:, None], table)
        rows: Ints = self._dense[key]
        return rows

    def _sparse_rows(self, keys: Ints, table: TokenTable) -> Ints:
        unique, inverse = np.unique(keys, axis=0, return_inverse=True)
        names = list(map(tuple, unique.tolist()))
        missing = [n for n, name in enumerate(names) if name not in self._sparse]
        if missing:
            new = self._append(unique[missing], table).tolist()
            self._sparse.update(zip((names[n] for n in missing), new, strict=True))
        rows = np.array([self._sparse[name] for name in names], np.int64)
        found: Ints = rows[inverse.reshape(-1)]
        return found

    def texts(self, keys: Ints, stop: int | None = None) -> list[str]:
        """Texts of the first `stop` parts for rows of numbers [R, columns]."""
        places = [self.columns.index(part.column) if part.column else 0 for part in self.parts]
        chosen = list(zip(self.parts, places, strict=True))[:stop]
        return [
            "".join(self._wording.text(part, row[place] if row else 0) for part, place in chosen)
            for row in (keys.tolist() if self.columns else [[]] * len(keys))
        ]

    def encode(self, keys: Ints, stop: int | None = None) -> list[list[int]]:
        """Ids of `texts`."""
        if self.parts[0].kind == "control":
            return [list(self.parts[0].ids)] * len(keys)
        return self._tokens.continued(self.texts(keys, stop), self._before, start=self._start)

    def _append(self, keys: Ints, table: TokenTable) -> Ints:
        ids = self.encode(keys)
        if self._answer is None or self._answers is None:
            return table.append(ids)
        heads = self.encode(keys, self._answer)
        labels = keys[:, self.columns.index(self.parts[self._answer].column)].tolist()
        marks = [
            (len(head) - 1, label)
            if row[: len(head) + 1] == [*head, self._answers[label]]
            else None
            for row, head, label in zip(ids, heads, labels, strict=True)
        ]
        return table.append(ids, marks)


def whole(parts: Mapping[Name, Sequence[Part]], cut: bool) -> Cuts:
    """Cuts everywhere, or nowhere but at control ids."""
    return {
        name: [
            cut or "control" in (left.kind, right.kind) for left, right in itertools.pairwise(row)
        ]
        for name, row in parts.items()
    }


def grouped(parts: Sequence[Part], cuts: Sequence[bool]) -> Iterator[tuple[int, list[Part]]]:
    """Runs of parts between cuts, each with the position of its first."""
    bounds = [0, *(n + 1 for n, cut in enumerate(cuts) if cut), len(parts)]
    for first, last in itertools.pairwise(bounds):
        if last > first:
            yield first, list(parts[first:last])


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


def _at_slot(pieces: Sequence[Piece]) -> tuple[Sequence[Piece], Sequence[Piece]]:
    slot = next(n for n, piece in enumerate(pieces) if piece.kind == "soft")
    return pieces[:slot], pieces[slot + 1 :]


def _literal(text: str) -> list[Part]:
    return [Part("text", ((text, None),), example=text)] if text else []


def _sourced(piece: Piece, source: str, yes: str, constants: Collection[str]) -> Part:
    """A part whose values come from the line before (`before_`) or the one that ends the span."""
    columns = {"index0": "index", "stars": "rating", "answer": "label"}
    examples = {"index": "1", "index0": "1", "rating": "4", "stars": "stars", "answer": yes}
    column = columns.get(piece.kind, piece.kind)
    if piece.kind == "text":
        column = "item" if any(name not in constants for name in piece.fields) else ""
    example = examples.get(piece.kind, piece.tail or "a")
    return Part(piece.kind, piece.parts, source + column if column else "", example)

"""The prompt builder: ids, soft-token slots and answer positions, recorded while it builds.

A prompt is built from ids that were tokenised once (`spans`), for a whole batch at a time
(`assemble`); its text is never rendered, let alone searched. The ids are those the tokenizer gives
for the rendered text between two slots (`render` is that text, `boundaries` sees to the equality).
Leaving the slots out gives the prompt of a run without soft tokens, id for id.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rellax_ds import runtime
from rellax_ds.errors import ConfigError
from rellax_ds.prompts import boundaries
from rellax_ds.prompts.assemble import (
    EMPTY,
    Histories,
    Layout,
    Prompts,
    TokenTable,
    gather,
    offsets_of,
)
from rellax_ds.prompts.spans import NAMES, Unit, Wording, display_name, span_parts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from rellax_ds.prompts.assemble import Ints
    from rellax_ds.prompts.boundaries import Verdict
    from rellax_ds.prompts.spans import Cuts, Name, Part
    from rellax_ds.prompts.templates import Piece, Template
    from rellax_ds.prompts.tokens import PromptTokens

__all__ = ["Histories", "History", "Prompt", "PromptBuilder", "Prompts", "display_name"]

_FIXED = ("opening", "lead_in", "between", "lead_out")
_MAX_IDS = 1 << 26
"""Remembered ids beyond which the memory starts afresh (256 MiB)."""


@dataclass(frozen=True)
class History:
    """Behaviour a prompt may show, in the order shown; K events.

    Attributes:
        items: Item rows [K].
        ratings: Ratings [K].
        labels: 1 for a like [K].
        drop_order: Positions 0..K-1 in the order they are given up when the prompt is too long.
    """

    items: Sequence[int] | npt.NDArray[Any]
    ratings: Sequence[float] | npt.NDArray[Any]
    labels: Sequence[int] | npt.NDArray[Any]
    drop_order: Sequence[int] | npt.NDArray[Any]


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


class PromptBuilder:
    """Builds prompts from one template, one tokenizer and the text columns of the tables.

    Attributes:
        answer_ids: Ids of yes and no at the target's question.
        history_supervised: Whether the history holds answers with these very ids, so that the same
            two rows of the head can be trained on them.
        wrapped: Whether a chat template stands around the content.
        tokens: The tokenizer.
        cuts: Where text is cut for the tokenizer; give it to builders of the same template,
            tokenizer and tables.
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
        cuts: Cuts | None = None,
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
            cuts: Found by an equal builder before; by default the tokenizer is tried here.

        Raises:
            ConfigError: A field has no column, or an answer is not one token.
        """
        self._template, self.tokens = template, tokens
        self._soft, self._max_tokens = soft_slots, max_tokens
        self._wrapper = tokens.wrapper(chat)
        self.wrapped = bool(self._wrapper.tail)
        question = template.question(self.wrapped)
        profile = self._checked_fields(question, items, users, constants)
        self._answer_tokens(question)
        self._wording = Wording(template, profile, items, users, constants)
        self._parts = span_parts(template, self._wrapper, bool(profile), question, constants)
        starts = self._wrapper.starts
        if cuts is None:
            cuts = boundaries.find_cuts(self._parts, self._unit, self._wording, starts)
            boundaries.report(self._parts, cuts, tokens.name)
        self.cuts = cuts
        self._forget()

    @property
    def boundaries(self) -> Verdict:
        """`exact` if every piece of the template is tokenised on its own, `joined` if some are
        taken together to keep the ids those of the whole text.
        """
        return boundaries.verdict(self._parts, self.cuts)

    def build_batch(
        self,
        users: npt.NDArray[Any],
        items: npt.NDArray[Any],
        labels: npt.NDArray[Any],
        histories: Histories,
    ) -> Prompts:
        """N prompts, shortened to `max_tokens` by dropping history items, never the question.

        Args:
            users: Rows of the user table [N].
            items: Rows of the candidates in the item table [N].
            labels: 1 if the candidate was liked [N].
            histories: Events before the candidates.

        Raises:
            ConfigError: Not even a question fits.
        """
        if len(self._table.ids) > _MAX_IDS:
            self._forget()
        kept = np.ones(len(histories.items), bool)
        layout = self._lay_out(users, items, histories, kept)
        over = np.flatnonzero(layout.prompt_lengths > self._max_tokens)
        clipped = np.zeros(len(users), np.int64)
        if len(over):
            dropped = np.zeros(len(users), np.int64)
            dropped[over] = self._drops(users[over], items[over], histories.take(over))
            kept = histories.drop_rank >= np.repeat(dropped, histories.sizes)
            layout = self._lay_out(users, items, histories, kept)
            clipped = np.maximum(layout.prompt_lengths - self._max_tokens, 0)
            for prompt in np.flatnonzero(clipped).tolist():
                self._clip(layout, prompt, int(items[prompt]), int(clipped[prompt]))
        return gather(self._table, layout, labels, kept, clipped)

    def build(self, user: int, item: int, label: int, history: History) -> Prompt:
        """One prompt; see `build_batch`.

        Args:
            user: Row of the user table.
            item: Row of the candidate in the item table.
            label: 1 if the candidate was liked.
            history: Events before the candidate.

        Raises:
            ConfigError: Not even the question fits.
        """
        histories = _columns(history)
        found = self.build_batch(np.array([user]), np.array([item]), np.array([label]), histories)
        kept = tuple(np.flatnonzero(found.kept).tolist())
        ids, slots, answers = found.input_ids, found.slot_items, found.answers
        return Prompt(ids, slots, answers, kept, int(found.clipped[0]))

    def render(self, user: int, item: int, history: History) -> tuple[str, ...]:
        """The full text of a prompt, cut at its soft tokens: K + 2 texts around K + 1 slots.

        Control tokens of the wrapper are part of the text; what the tokenizer opens every text
        with is not. Nothing is left out, however long it is.

        Args:
            user: Row of the user table.
            item: Row of the candidate.
            history: All of it is shown.
        """
        columns = _columns(history)
        values, kinds, *_ = self._blocks(
            np.array([user]), np.array([item]), columns, np.ones(len(columns.items), bool)
        )
        texts = []
        for block, kind in enumerate(kinds.tolist()):
            parts = [part for part in self._parts[NAMES[kind]] if part.kind != "control"]
            texts.append(
                "".join(
                    self._wording.text(part, int(values[part.column][block]) if part.column else 0)
                    for part in parts
                )
            )
        if self.wrapped:
            head, tail = self._wrapper.before, self._wrapper.tail
            texts[0] = head.removesuffix(self._wrapper.lead) + texts[0]
            texts[-1] += tail.removeprefix(self._wrapper.trail)
        return tuple(texts)

    def _lay_out(
        self,
        users: npt.NDArray[Any],
        items: npt.NDArray[Any],
        histories: Histories,
        kept: npt.NDArray[np.bool_],
    ) -> Layout:
        values, kinds, first_block = self._blocks(users, items, histories, kept)
        width = max(len(units) for units in self._units.values()) + 1
        rows = np.full((len(kinds), width), EMPTY, np.int64)
        for number, name in enumerate(NAMES):
            blocks = np.flatnonzero(kinds == number)
            if not len(blocks):
                continue
            chosen = {column: numbers[blocks] for column, numbers in values.items()}
            for place, unit in enumerate(self._units[name]):
                rows[blocks, place] = unit.rows(chosen, self._table)
        has_slot = kinds != NAMES.index("close")
        if self._soft:
            rows[has_slot, -1] = self._slot_row
        slot_item = np.where(has_slot, values["item"], -1)
        return Layout(rows, self._table.lengths[rows], first_block, slot_item)

    def _blocks(
        self,
        users: npt.NDArray[Any],
        items: npt.NDArray[Any],
        histories: Histories,
        kept: npt.NDArray[np.bool_],
    ) -> tuple[dict[str, Ints], Ints, Ints]:
        """The spans of N prompts in order: the numbers their texts depend on, their kinds, and the
        first span of every prompt.
        """
        prompt_of = np.repeat(np.arange(len(users)), histories.sizes)[kept]
        shown = np.bincount(prompt_of, minlength=len(users))
        bounds = offsets_of(shown + 2)
        index = np.arange(len(prompt_of)) - np.repeat(offsets_of(shown)[:-1], shown) + 1
        lines = bounds[prompt_of] + index - 1
        ask, close = bounds[1:] - 2, bounds[1:] - 1
        kinds = np.full(bounds[-1], NAMES.index("mid"), np.int64)
        kinds[lines[index == 1]] = NAMES.index("open")
        kinds[ask] = np.where(shown > 0, NAMES.index("ask"), NAMES.index("bare"))
        kinds[close] = NAMES.index("close")
        values: dict[str, Ints] = {}
        ratings = self._wording.rating_numbers(np.asarray(histories.ratings)[kept])
        columns = {
            "item": histories.items[kept],
            "rating": ratings,
            "index": index,
            "label": histories.labels[kept],
        }
        for name, numbers in columns.items():
            values[name] = np.zeros(bounds[-1], np.int64)
            values[name][lines] = numbers
        values["item"][ask] = items
        for name in columns:
            values[f"before_{name}"] = np.roll(values[name], 1)
        profiles = self._wording.profile_numbers(users)
        values["profile"] = np.repeat(profiles, shown + 2)
        return values, kinds, bounds[:-1]

    def _drops(
        self, users: npt.NDArray[Any], items: npt.NDArray[Any], histories: Histories
    ) -> Ints:
        """Fewest history items to leave out of every one of N too long prompts, or all of them.

        All prompts are bisected side by side, on the lengths of their rows alone.
        """
        low = np.minimum(1, histories.sizes)
        high = histories.sizes.copy()
        while (low < high).any():
            middle = (low + high) // 2
            kept = histories.drop_rank >= np.repeat(middle, histories.sizes)
            layout = self._lay_out(users, items, histories, kept)
            fits = layout.prompt_lengths <= self._max_tokens
            high = np.where(fits, middle, high)
            low = np.where(fits | (low == high), low, middle + 1)
        return low

    def _clip(self, layout: Layout, prompt: int, item: int, count: int) -> None:
        """Take `count` tokens off the title of a question that stands alone and is too long."""
        name, place = self._titled
        block = layout.first_block[prompt] + (name == "close")
        room = int(layout.lengths[block, place])
        if count >= room:
            raise ConfigError(
                f"shards.max_tokens {self._max_tokens} does not hold the question without any"
                f" history; it needs at least {count - room + 1} more"
            )
        layout.lengths[block, place] -= count
        runtime.logger.warning(
            "shards: the title of item %d loses %d tokens: shards.max_tokens %d holds no more",
            item,
            count,
            self._max_tokens,
        )

    def _forget(self) -> None:
        """Start with an empty table; every unit is tokenised again when it is needed."""
        self._table = TokenTable()
        (self._slot_row,) = self._table.append([[self.tokens.slot_id]])
        self._units: dict[Name, list[Unit]] = {
            name: boundaries.units_of(
                self._parts[name],
                self.cuts[name],
                self._unit,
                boundaries.starts_span(name, self._wrapper.starts),
            )
            for name in NAMES
        }
        titled = [
            (name, place)
            for name in ("bare", "close")
            for place, unit in enumerate(self._units[name])
            if any(part.titled for part in unit.parts)
        ]
        self._titled: tuple[str, int] = titled[0] if titled else ("bare", 0)

    def _unit(self, parts: Sequence[Part], before: str, start: bool) -> Unit:
        return Unit(
            parts,
            before,
            start,
            wording=self._wording,
            tokens=self.tokens,
            answers=(self.answer_ids.no, self.answer_ids.yes) if self.history_supervised else None,
        )

    def _answer_tokens(self, question: Sequence[Piece]) -> None:
        template, wrapper = self._template, self._wrapper
        yes, no = template.yes, template.no
        if self.wrapped and not wrapper.blank:
            yes, no = yes.strip(), no.strip()
        tail = wrapper.tail if self.wrapped else question[-1].tail
        self.answer_ids = self.tokens.answers(tail, yes, no, control=self.wrapped)
        self.history_supervised = False
        pieces = template.pieces("history")
        for before, piece in itertools.pairwise(pieces):
            if piece.kind == "answer":
                found = self.tokens.answers(before.tail, template.yes, template.no, control=False)
                self.history_supervised = found == self.answer_ids

    def _checked_fields(
        self,
        question: Sequence[Piece],
        items: Mapping[str, Any],
        users: Mapping[str, Any],
        constants: Mapping[str, str],
    ) -> tuple[Piece, ...]:
        """Check that every field has a column; returns the profile, or nothing if it has none."""
        template = self._template
        known = [*items, "name", "quote", "quoted", *constants]
        for key, pieces, columns in (
            *((key, template.pieces(key), list(constants)) for key in _FIXED),
            ("history", template.pieces("history"), known),
            ("target", question, known),
        ):
            for name in (name for piece in pieces for name in piece.fields):
                if name not in columns:
                    raise ConfigError(
                        f"template {template.name}: '{key}' names {{{name}}}, which is no column;"
                        f" choose among {', '.join(columns)}"
                    )
        profile = template.pieces("profile")
        for name in (name for piece in profile for name in piece.fields):
            if name not in users and name not in constants:
                runtime.logger.warning(
                    "shards: no profile line, the user table has no column '%s'", name
                )
                return ()
        return profile


def _columns(history: History) -> Histories:
    size = len(history.items)
    rank = np.empty(size, np.int64)
    rank[np.asarray(history.drop_order, np.int64)] = np.arange(size)
    return Histories(
        np.array([0, size]),
        np.asarray(history.items, np.int64),
        np.asarray(history.ratings, np.float64),
        np.asarray(history.labels, np.int64),
        rank,
    )

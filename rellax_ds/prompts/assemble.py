"""Prompts by the thousand: token rows tokenised once, gathered into prompts with array operations.

A prompt is a sequence of rows of one ragged table of token ids. Which rows, is decided by `spans`;
here they are joined. Lengths are known before a single id is copied, so what has to be left out of
a prompt that is too long follows from sums of lengths, and slots and answers are placed in the
same pass that lays out the ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

EMPTY = 0
"""The row without tokens, which fills a block that has fewer units than another."""

UNMARKED = -(1 << 30)


@dataclass(frozen=True)
class Histories:
    """The behaviour that N prompts may show, in the order shown; M events over all prompts.

    Attributes:
        offsets: int64 [N + 1]; prompt n shows events `offsets[n]:offsets[n + 1]`.
        items: Item rows [M].
        ratings: Ratings [M].
        labels: 1 for a like [M].
        drop_rank: Of the events of one prompt, 0 for the first to be given up when the prompt is
            too long, then 1, and so on [M].
    """

    offsets: Ints
    items: npt.NDArray[Any]
    ratings: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    drop_rank: npt.NDArray[Any]

    @property
    def sizes(self) -> Ints:
        """Events of every prompt [N]."""
        return np.diff(self.offsets)

    def take(self, prompts: Ints) -> Histories:
        """The histories of some of the prompts."""
        sizes = self.sizes[prompts]
        events = ragged(self.offsets[prompts], sizes)
        columns = (self.items, self.ratings, self.labels, self.drop_rank)
        return Histories(offsets_of(sizes), *(column[events] for column in columns))


@dataclass(frozen=True)
class Prompts:
    """N prompts of T tokens together.

    Attributes:
        offsets: int64 [N + 1]; prompt n is `offsets[n]:offsets[n + 1]` of the token columns.
        input_ids: int32 [T].
        slot_items: int32 [T], item row at a soft-token slot, -1 elsewhere.
        answers: int32 [T], label where the next token is a supervised answer, -1 elsewhere; a
            prompt's last position is the target's question.
        kept: bool [M], whether an event of the history is shown.
        clipped: int64 [N], tokens taken off the candidate's title.
    """

    offsets: Ints
    input_ids: npt.NDArray[np.int32]
    slot_items: npt.NDArray[np.int32]
    answers: npt.NDArray[np.int32]
    kept: npt.NDArray[np.bool_]
    clipped: Ints

    def __len__(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of every prompt [N]."""
        return np.diff(self.offsets)


class TokenTable:
    """Rows of token ids of any length, appended to and never changed; row 0 is empty.

    A row may carry one mark: the position, counted from its first token, whose next token is a
    supervised answer (-1 for an answer that begins the row), and that answer's label.
    """

    def __init__(self) -> None:
        self._ids = np.empty(1 << 12, np.int32)
        self._columns = np.empty((4, 1 << 8), np.int64)
        self._num_ids = self._num_rows = 0
        self.append([[]])

    def append(
        self, rows: Sequence[Sequence[int]], marks: Sequence[tuple[int, int] | None] = ()
    ) -> Ints:
        """Add rows and return their numbers.

        Args:
            rows: Ids of every new row.
            marks: (position, label) of every new row, or nothing at all.
        """
        first, sizes = self._num_rows, np.array([len(row) for row in rows], np.int64)
        total = int(sizes.sum())
        self._ids = _grown(self._ids, self._num_ids + total)
        self._columns = _grown(self._columns, first + len(rows))
        flat = [id_ for row in rows for id_ in row]
        self._ids[self._num_ids : self._num_ids + total] = flat
        new = self._columns[:, first : first + len(rows)]
        new[0] = self._num_ids + np.cumsum(sizes) - sizes
        new[1] = sizes
        new[2], new[3] = UNMARKED, -1
        for n, mark in enumerate(marks):
            if mark is not None:
                new[2:, n] = mark
        self._num_ids += total
        self._num_rows += len(rows)
        return np.arange(first, self._num_rows)

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """All ids, row after row."""
        return self._ids[: self._num_ids]

    @property
    def starts(self) -> Ints:
        """First id of every row."""
        return self._columns[0, : self._num_rows]

    @property
    def lengths(self) -> Ints:
        """Ids of every row."""
        return self._columns[1, : self._num_rows]

    @property
    def marks(self) -> Ints:
        """Marked position of every row, `UNMARKED` without one."""
        return self._columns[2, : self._num_rows]

    @property
    def mark_labels(self) -> Ints:
        """Label at the mark of every row."""
        return self._columns[3, : self._num_rows]


@dataclass(frozen=True)
class Layout:
    """The rows that make up N prompts, before any id is copied.

    A block ends with the place of a soft token, all have the same number W of units, and the
    blocks of a prompt follow each other; so the flattened matrix is the prompts in order.

    Attributes:
        rows: int64 [B, W], rows of the token table; the last column is the slot's.
        lengths: int64 [B, W], tokens of each that are used.
        first_block: int64 [N].
        slot_item: int64 [B], item of the block's slot, -1 if it has none.
    """

    rows: Ints
    lengths: Ints
    first_block: Ints
    slot_item: Ints

    @property
    def prompt_lengths(self) -> Ints:
        """Tokens of every prompt [N]."""
        if not len(self.first_block):
            return np.zeros(0, np.int64)
        total: Ints = np.add.reduceat(self.lengths.sum(axis=1), self.first_block)
        return total


def gather(
    table: TokenTable,
    layout: Layout,
    labels: npt.NDArray[Any],
    kept: npt.NDArray[np.bool_],
    clipped: Ints,
) -> Prompts:
    """Copy the ids of a layout and place slots and answers.

    Args:
        table: Rows of ids.
        layout: Which rows.
        labels: Label of every prompt's target [N].
        kept: Passed on.
        clipped: Passed on.
    """
    rows, sizes = layout.rows.ravel(), layout.lengths.ravel()
    begins = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    used = np.flatnonzero(sizes)
    source = np.repeat(table.starts[rows[used]] - begins[used], sizes[used])
    source += np.arange(total)
    slot_items, answers = np.full(total, -1, np.int32), np.full(total, -1, np.int32)
    slots = begins.reshape(layout.rows.shape)[:, -1]
    filled = (layout.lengths[:, -1] > 0) & (layout.slot_item >= 0)
    slot_items[slots[filled]] = layout.slot_item[filled]
    marked = np.flatnonzero(table.marks[rows] > UNMARKED)
    answers[begins[marked] + table.marks[rows[marked]]] = table.mark_labels[rows[marked]]
    offsets = offsets_of(layout.prompt_lengths)
    answers[offsets[1:] - 1] = labels
    return Prompts(offsets, table.ids[source], slot_items, answers, kept, clipped)


def offsets_of(sizes: npt.NDArray[Any]) -> Ints:
    """Bounds of consecutive runs of the given sizes, int64 [N + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def ragged(starts: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> Ints:
    """The integers of the ranges `start : start + size`, one range after the other."""
    offsets = offsets_of(sizes)
    return np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1])


def _grown(array: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    capacity = array.shape[-1]
    if size <= capacity:
        return array
    larger = np.empty((*array.shape[:-1], max(size, 2 * capacity)), array.dtype)
    larger[..., :capacity] = array
    return larger

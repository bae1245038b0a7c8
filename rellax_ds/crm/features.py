"""Features of the conventional recommender: samples and events as integer ids, gathered by batch.

Events are one column sorted by (user, time), so the last K behaviours before a target are the rows
that end at its `history_end`. A batch is a few gathers with an index matrix: no list per row, and
memory follows the batch, not the log. A row's label is never a feature, and no history can reach
an event at or after its target: windows are built from `history_end`, retrieved events are checked
against it.

One id space serves one embedding table. Id 0 is padding and every value the recommender was not
trained on; item i is id i + 1, so the first rows of the table are the item table that SPA reads;
the values of the other columns and the ratings follow.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from rellax_ds.errors import ConfigError, TableError
from rellax_ds.schema import RETRIEVED, SPLITS
from rellax_ds.tables import read_parquet

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from rellax_ds.config import CRMConfig
    from rellax_ds.tables import Tables

    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]


NUM_GAPS = 40
"""Ages of behaviours: id n is 2^(n-1) - 1 to 2^n - 2 seconds, so the last begins at 8,700 years."""


class FeatureBatch(NamedTuple):
    """Ids of B samples; F fields, K behaviours (right-padded, oldest first).

    Attributes:
        fields: int64 [B, F]: user columns, target item, target item's columns.
        items: int64 [B, K], items of the history; 0 also for an item unseen in training.
        ratings: int64 [B, K], ratings of the history.
        mask: bool [B, K], True for a behaviour, False for padding.
        gaps: int64 [B, K] in [0, NUM_GAPS), age of each behaviour at the target's time on a scale
            of powers of two, 0 for padding; None without event times.
        categories: int64 [B, K], ids of the history in the field `Vocabulary.category`; None
            without one.
    """

    fields: torch.Tensor
    items: torch.Tensor
    ratings: torch.Tensor
    mask: torch.Tensor
    gaps: torch.Tensor | None = None
    categories: torch.Tensor | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Which values have an embedding, in the order of their ids.

    Attributes:
        num_items: Items of the catalogue, seen or not.
        unseen_items: Items (row numbers) that the recommender's training rows never hold.
        user_fields: Column of `users` to its values.
        item_fields: Column of `items` to its values.
        ratings: Ratings of the history, doubled so that half stars are integers.
        category: Item field that the hard search of `sim_full` compares, if it searches.
    """

    num_items: int
    unseen_items: tuple[int, ...]
    user_fields: dict[str, tuple[str, ...]]
    item_fields: dict[str, tuple[str, ...]]
    ratings: tuple[int, ...]
    category: str | None = None

    @property
    def num_features(self) -> int:
        """Rows of the embedding table, the padding row included."""
        fields = (*self.user_fields.values(), *self.item_fields.values(), self.ratings)
        return 1 + self.num_items + sum(len(values) for values in fields)

    @property
    def num_fields(self) -> int:
        """F, ids of a sample without its history."""
        return len(self.user_fields) + 1 + len(self.item_fields)

    @property
    def item_field(self) -> int:
        """Position of the target item among the F fields; the user's come before it."""
        return len(self.user_fields)

    @property
    def category_field(self) -> int | None:
        """Position of the target's category among the F fields."""
        if self.category is None:
            return None
        return self.item_field + 1 + list(self.item_fields).index(self.category)

    def document(self) -> dict[str, Any]:
        """The vocabulary as JSON, columns as a list because their order gives the ids."""
        columns = {"user_fields": self.user_fields, "item_fields": self.item_fields}
        pairs = {name: list(fields.items()) for name, fields in columns.items()}
        return {**asdict(self), **pairs}

    @classmethod
    def parse(cls, document: dict[str, Any]) -> Vocabulary:
        """The vocabulary that `document` wrote."""
        return cls(
            num_items=int(document["num_items"]),
            unseen_items=tuple(document["unseen_items"]),
            user_fields={name: tuple(values) for name, values in document["user_fields"]},
            item_fields={name: tuple(values) for name, values in document["item_fields"]},
            ratings=tuple(document["ratings"]),
            category=document.get("category"),
        )


@dataclass(frozen=True)
class Interactions:
    """The columns of the stage-1 tables that the recommender reads; N samples in time order.

    Attributes:
        users: Table of users with its profile columns.
        items: Table of items with its text columns.
        event_item: int32 [num_events].
        event_rating: int64 [num_events], twice the rating.
        sample_user: int32 [N].
        sample_item: int32 [N].
        label: int8 [N]; what is predicted, never a feature.
        split: int8 [N], position in `schema.SPLITS`.
        history_start: int64 [N].
        history_end: int64 [N], first event that is not history.
        event_time: int64 [num_events], seconds.
        sample_time: int64 [N], seconds.
    """

    users: pa.Table
    items: pa.Table
    event_item: NDArray[np.int32]
    event_rating: IntArray
    sample_user: NDArray[np.int32]
    sample_item: NDArray[np.int32]
    label: NDArray[np.int8]
    split: NDArray[np.int8]
    history_start: IntArray
    history_end: IntArray
    event_time: IntArray | None = None
    sample_time: IntArray | None = None

    @classmethod
    def of(cls, tables: Tables) -> Interactions:
        """Take the columns out of the tables.

        Raises:
            TableError: A history reaches its own target.
        """
        events, samples = tables.events, tables.samples
        late = np.flatnonzero(_numpy(samples, "history_end") > _numpy(samples, "event"))
        if late.size:
            raise TableError(
                f"samples: the history of sample {late[0]} reaches its own target; "
                "rerun `rellax tables`"
            )
        time = _numpy(events, "time")
        return cls(
            users=tables.users,
            items=tables.items,
            event_item=_numpy(events, "item"),
            event_rating=np.rint(2 * _numpy(events, "rating")).astype(np.int64),
            sample_user=_numpy(samples, "user"),
            sample_item=_numpy(samples, "item"),
            label=_numpy(samples, "label"),
            split=_numpy(samples, "split"),
            history_start=_numpy(samples, "history_start"),
            history_end=_numpy(samples, "history_end"),
            event_time=time,
            sample_time=time[_numpy(samples, "event")],
        )

    @property
    def num_samples(self) -> int:
        """N, samples of all splits."""
        return len(self.label)

    def split_rows(self, split: str) -> IntArray:
        """Sample ids of a split, in time order."""
        return np.flatnonzero(self.split == SPLITS.index(split))


class History(Protocol):
    """Finds the behaviours of a batch of samples."""

    def event_rows(self, samples: IntArray) -> tuple[IntArray, BoolArray]:
        """Rows of `events` [B, K], any valid row where the mask [B, K] is False."""
        ...


class RecentHistory:
    """The last `length` events before the target."""

    def __init__(self, log: Interactions, length: int) -> None:
        """Keep the ends of every sample's window; `length` is K."""
        self.end = log.history_end
        self.start = np.maximum(log.history_start, log.history_end - length)
        self.length = length

    def event_rows(self, samples: IntArray) -> tuple[IntArray, BoolArray]:
        """See `History`."""
        start, end = self.start[samples, None], self.end[samples, None]
        rows = start + np.arange(self.length)
        mask = rows < end
        return np.where(mask, rows, 0), mask


class RetrievedHistory:
    """The `length` events most similar to the target, in time order (SIM's input)."""

    def __init__(self, log: Interactions, path: Path, length: int) -> None:
        """Read stage 3's table and check it against the samples' histories.

        Raises:
            TableError: The table has another number of rows, or holds an event outside a sample's
                history.
        """
        retrieved = read_parquet(path, RETRIEVED)
        if not np.array_equal(_numpy(retrieved, "sample"), np.arange(log.num_samples)):
            raise TableError(
                f"{path}: its {retrieved.num_rows} rows are not the {log.num_samples} samples in "
                "order; rerun `rellax retrieval`"
            )
        self.offsets, self.events = _ragged(retrieved, "events")
        _, self.similarity = _ragged(retrieved, "similarity")
        self.length = length
        sample = np.repeat(np.arange(log.num_samples), np.diff(self.offsets))
        late = self.events >= log.history_end[sample]
        outside = np.flatnonzero(late | (self.events < log.history_start[sample]))
        if outside.size:
            raise TableError(
                f"{path}: sample {sample[outside[0]]} has event {self.events[outside[0]]}, which "
                "is not in its history; rerun `rellax retrieval`"
            )

    def event_rows(self, samples: IntArray) -> tuple[IntArray, BoolArray]:
        """See `History`; of more events the most similar stay, and of equals the later."""
        start = self.offsets[samples, None]
        counts = self.offsets[samples + 1, None] - start
        column = np.arange(max(int(counts.max(initial=0)), self.length))[None, :]
        if column.size > self.length:
            similarity = self._at(self.similarity, start + column, column < counts, -np.inf)
            later_first = np.broadcast_to(-column, similarity.shape)
            column = np.lexsort((later_first, -similarity))[:, : self.length]
            column.sort(axis=1)
        mask = column < counts
        return self._at(self.events, start + column, mask, 0), mask

    @staticmethod
    def _at(values: NDArray[Any], index: IntArray, mask: BoolArray, default: float) -> NDArray[Any]:
        found = np.full(index.shape, default, values.dtype)
        found[mask] = values[index[mask]]
        return found


def build_history(log: Interactions, config: CRMConfig, retrieval: Path | None) -> History:
    """The history that `config.kind` reads; `retrieval` is stage 3's folder, needed by SIM."""
    if config.kind != "sim":
        return RecentHistory(log, config.history_length)
    if retrieval is None:
        raise TableError("crm.kind sim reads retrieved histories; run `rellax retrieval` first")
    return RetrievedHistory(log, retrieval / "retrieved.parquet", config.history_length)


def build_vocabulary(
    log: Interactions, history: History, train_rows: IntArray, config: CRMConfig
) -> Vocabulary:
    """Collect the values that the recommender's own training rows hold.

    A column whose distinct values exceed `config.identifier_share` of the table's rows (a zip code,
    a title) only names the row, which the item id does already and which is noise for a user unseen
    in training; it is not read. The user id itself follows `config.user_id_field`.

    Args:
        log: Users, items, events and samples.
        history: History the recommender reads.
        train_rows: Sample ids it is trained on, [n].
        config: The recipe's section.

    Raises:
        ConfigError: The hard search is to compare a column that is no field.
    """
    seen_events = np.zeros(len(log.event_item), bool)
    for part in np.array_split(train_rows, 1 + len(train_rows) // 65536):
        rows, mask = history.event_rows(part)
        seen_events[rows[mask]] = True
    seen_items = np.zeros(log.items.num_rows, bool)
    seen_items[log.event_item[seen_events]] = True
    seen_items[log.sample_item[train_rows]] = True
    seen_users = np.unique(log.sample_user[train_rows]).astype(np.int64)

    def fields(table: pa.Table, rows: IntArray, skipped: str) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(sorted(pc.unique(table[name].take(rows).drop_null()).to_pylist()))
            for name in table.column_names
            if table.schema.field(name).type == pa.string()
            and name != skipped
            and (name == "user_id" or not _is_identifier(table[name], config.identifier_share))
        }

    item_fields = fields(log.items, np.flatnonzero(seen_items), "item_id")
    category = config.search_field if config.searches_by_category else None
    if category is not None and category not in item_fields:
        raise ConfigError(
            f"crm.search_field '{category}': no field of items; choose "
            f"{', '.join(item_fields) or 'crm.search soft'}"
        )
    return Vocabulary(
        num_items=log.items.num_rows,
        unseen_items=tuple(np.flatnonzero(~seen_items).tolist()),
        user_fields=fields(log.users, seen_users, "" if config.user_id_field else "user_id"),
        item_fields=item_fields,
        ratings=tuple(np.unique(log.event_rating[seen_events]).tolist()),
        category=category,
    )


class Features:
    """Ids of every user, item and event under a vocabulary, and the gather of a batch."""

    def __init__(self, log: Interactions, history: History, vocabulary: Vocabulary) -> None:
        """Encode the tables once: memory is one id per user or item and field, two per event.

        Raises:
            TableError: The vocabulary is of another catalogue, or names a column that is missing.
        """
        if vocabulary.num_items != log.items.num_rows:
            raise TableError(
                f"the recommender knows {vocabulary.num_items} items, the table has "
                f"{log.items.num_rows}; rerun `rellax crm`"
            )
        items = np.arange(1, vocabulary.num_items + 1, dtype=np.int32)
        items[list(vocabulary.unseen_items)] = 0
        offset = 1 + vocabulary.num_items
        user_codes, item_codes = [], [items]
        for name, values in vocabulary.user_fields.items():
            user_codes.append(_encode(_column(log.users, name), values, offset))
            offset += len(values)
        for name, values in vocabulary.item_fields.items():
            item_codes.append(_encode(_column(log.items, name), values, offset))
            offset += len(values)
        ratings = _encode(pa.array(log.event_rating), vocabulary.ratings, offset)
        empty = np.zeros((log.users.num_rows, 0), np.int32)
        self._user = np.column_stack([empty, *user_codes])
        self._item = np.column_stack(item_codes)
        self._event_item = items[log.event_item]
        self._event_rating = ratings
        self._category = None
        if vocabulary.category_field is not None:
            self._category = self._item[:, vocabulary.category_field - vocabulary.item_field]
        self._log, self._history = log, history

    def gather(self, samples: IntArray) -> FeatureBatch:
        """Ids of the samples with these row numbers, [B]."""
        user, item = self._log.sample_user[samples], self._log.sample_item[samples]
        rows, mask = self._history.event_rows(samples)
        return FeatureBatch(
            fields=_ids(np.concatenate([self._user[user], self._item[item]], axis=1)),
            items=_ids(np.where(mask, self._event_item[rows], 0)),
            ratings=_ids(np.where(mask, self._event_rating[rows], 0)),
            mask=torch.from_numpy(mask),
            gaps=self._gaps(samples, rows, mask),
            categories=self._categories(rows, mask),
        )

    def _gaps(self, samples: IntArray, rows: IntArray, mask: BoolArray) -> torch.Tensor | None:
        log = self._log
        if log.event_time is None or log.sample_time is None:
            return None
        seconds = log.sample_time[samples, None] - log.event_time[rows]
        # The exponent of a float is the exact whole part of its logarithm, and one more.
        exponent = np.frexp(1.0 + np.maximum(seconds, 0))[1]
        return _ids(np.where(mask, np.minimum(exponent, NUM_GAPS - 1), 0))

    def _categories(self, rows: IntArray, mask: BoolArray) -> torch.Tensor | None:
        if self._category is None:
            return None
        return _ids(np.where(mask, self._category[self._log.event_item[rows]], 0))


def _numpy(table: pa.Table, column: str) -> Any:
    return table[column].to_numpy()


def _ragged(table: pa.Table, column: str) -> tuple[IntArray, Any]:
    chunk = table[column].combine_chunks()
    chunks = chunk.chunks if isinstance(chunk, pa.ChunkedArray) else [chunk]
    lists = pa.concat_arrays(chunks) if chunks else pa.array([], table[column].type)
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[:1], lists.flatten().to_numpy()


def _is_identifier(column: pa.ChunkedArray, share: float) -> bool:
    return bool(pc.count_distinct(column).as_py() > share * len(column))


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise TableError(
            f"the recommender reads column '{name}', which the tables lack; rerun `rellax crm`"
        )
    return table[name]


def _encode(column: Any, values: tuple[Any, ...], offset: int) -> NDArray[np.int32]:
    position = pc.index_in(column, value_set=pa.array(values, column.type), skip_nulls=True)
    codes = position.fill_null(-offset).to_numpy(zero_copy_only=False) + offset
    return np.asarray(codes, dtype=np.int32)


def _ids(array: NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(array).long()

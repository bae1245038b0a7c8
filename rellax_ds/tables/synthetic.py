"""Made-up logs of any size with planted interests: ML-1M's and ML-25M's shapes without their rows.

Scale cannot be shown on a small log, and retrieval quality cannot be asserted on noise. So every
item has a topic, a user likes a few topics at a time and lets them drift from session to session,
and item vectors lie close within a topic: of a long history, the events most like a target must
share its topic more often than the latest ones do.

One compiled walk over the users fills the event columns in their final order, 20 bytes an event and
nothing besides, so 10^7 events take seconds. Everything random follows from the seed; items and
their vectors do not depend on the events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import polars as pl

from rellax_ds.errors import ConfigError
from rellax_ds.tables import RawLog
from rellax_ds.tables.movielens import GENRES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

_EPOCH = 946_684_800  # 2000-01-01
_SPAN = 3 * 365 * 86_400
_TRIES = 16  # draws before the walk looks for an unrated item one by one
_ITEMS, _VECTORS, _USERS, _EVENTS = range(4)

_AGES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56 and over")
_OCCUPATIONS = ("student", "engineer", "librarian", "writer", "artist", "nurse", "other")
_ADJECTIVES = (
    *("Silent", "Crimson", "Lost", "Second", "Northern", "Paper", "Golden", "Last"),
    *("Hidden", "Broken", "Little", "Winter", "Distant", "Burning", "Secret", "Long"),
)
_NOUNS = (
    *("Harbour", "Letter", "Garden", "Station", "Orchard", "Mirror", "Bridge", "River"),
    *("Window", "Train", "Island", "Promise", "Stranger", "Morning", "Circus", "Road"),
)


@dataclass(frozen=True)
class Spec:
    """The shape of a log.

    Attributes:
        num_users: Users, each with at least `min_events`.
        num_items: Catalogue; at large sizes some of its tail is never rated.
        num_events: Ratings, exactly.
        min_events: Events of the least active user.
        max_events: Cap on a user's events.
        spread: Sigma of the lognormal law that user activity beyond `min_events` follows.
        num_topics: Topics, of equal size; an item has one.
        num_interests: Topics a user likes at a time.
        session: Mean events in one sitting, most of them of one liked topic.
        drift: Chance that one interest is exchanged before a session.
        head: Items of a topic that are about equally popular, before the tail begins.
        tail: Popularity falls as (rank + head)^-tail.

    Raises:
        ConfigError: The counts contradict one another, or the popularity is no law.
    """

    num_users: int
    num_items: int
    num_events: int
    min_events: int = 20
    max_events: int = 30_000
    spread: float = 1.2
    num_topics: int = 18
    num_interests: int = 4
    session: float = 10.0
    drift: float = 0.1
    head: float = 10.0
    tail: float = 1.01

    def __post_init__(self) -> None:
        least, most = self.num_users * self.min_events, self.num_users * self.max_events
        if not least <= self.num_events <= most:
            raise ConfigError(
                f"synthetic: {self.num_users} users of {self.min_events} to {self.max_events} "
                f"events have {least} to {most}, num_events is {self.num_events}; change one"
            )
        if self.head <= 0 or self.tail <= 1:
            raise ConfigError(
                f"synthetic: head {self.head:g} and tail {self.tail:g} give no law of popularity; "
                "head is above 0 and tail above 1"
            )
        if not 1 <= self.num_topics <= self.num_items:
            raise ConfigError(
                f"synthetic: num_topics {self.num_topics} of num_items {self.num_items}; give "
                "every topic an item"
            )


SHAPES = {
    "ml1m": Spec(6_040, 3_706, 1_000_209, max_events=2_314, spread=1.14),
    "ml25m": Spec(162_541, 59_047, 25_000_095, max_events=30_000, spread=1.4, head=80.0, tail=2.5),
    "1e5": Spec(600, 5_000, 100_000, max_events=2_000),
    "1e6": Spec(6_000, 50_000, 1_000_000, max_events=10_000),
    "1e7": Spec(60_000, 60_000, 10_000_000),
}
"""Named logs: the published counts of ML-1M and ML-25M, and three powers of ten."""


def shape(name: str) -> Spec:
    """The named log of `SHAPES`.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in SHAPES:
        raise ConfigError(f"synthetic: no log is called '{name}'; choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def item_topics(spec: Spec, seed: int) -> Ints:
    """Topic of every item, int64 [num_items]; every topic has an item."""
    rng = np.random.default_rng([seed, _ITEMS])
    return rng.permutation(np.arange(spec.num_items, dtype=np.int64) % spec.num_topics)


def item_vectors(spec: Spec, seed: int, dimensions: int, noise: float = 0.8) -> Floats:
    """Unit vectors that are close within a topic and all different.

    Args:
        spec: The log.
        seed: Its seed.
        dimensions: d.
        noise: Length of an item's own part beside its topic's; the mean cosine within a topic is
            about 1 / (1 + noise^2).

    Returns:
        Float32 [num_items, d].
    """
    rng = np.random.default_rng([seed, _VECTORS])
    centres = _unit(rng.standard_normal((spec.num_topics, dimensions), np.float32))
    vectors = rng.standard_normal((spec.num_items, dimensions), np.float32)
    vectors *= np.float32(noise / np.sqrt(dimensions))
    vectors += centres[item_topics(spec, seed)]
    return _unit(vectors)


def event_columns(spec: Spec, seed: int) -> dict[str, Any]:
    """The events in (user, time, item) order, users and items by number.

    Popularity within a topic has a flat head and a tail of a power law. A user rates no item twice
    before having rated all; a later rating of the same item is at a later time.

    Args:
        spec: The log.
        seed: Everything random follows from it.

    Returns:
        `user`, `item` int32, `rating` float32 (1 to 5), `time` int64 seconds, all [num_events], and
        `user_start` int64 [num_users + 1], the users' ranges of rows.
    """
    rng = np.random.default_rng([seed, _EVENTS])
    user_start = np.zeros(spec.num_users + 1, np.int64)
    np.cumsum(_lengths(spec, rng), out=user_start[1:])
    life = _SPAN * rng.random(spec.num_users) ** 2
    begin = _EPOCH + ((_SPAN - life) * rng.random(spec.num_users)).astype(np.int64)

    # Items by topic, the most popular of each first.
    topics = item_topics(spec, seed)
    by_topic = rng.permutation(spec.num_items)
    by_topic = by_topic[np.argsort(topics[by_topic], kind="stable")].astype(np.int32)
    topic_start = np.searchsorted(topics[by_topic], np.arange(spec.num_topics + 1))

    item = np.empty(spec.num_events, np.int32)
    rating = np.empty(spec.num_events, np.float32)
    time = np.empty(spec.num_events, np.int64)
    _walk(
        rng,
        (user_start, life, begin),
        (by_topic, topic_start, rng.normal(0.0, 0.4, spec.num_items)),
        (spec.num_interests, spec.session, spec.drift, spec.head, spec.tail),
        (item, rating, time),
    )
    user = np.repeat(np.arange(spec.num_users, dtype=np.int32), np.diff(user_start))
    return {"user": user, "item": item, "rating": rating, "time": time, "user_start": user_start}


def raw_log(spec: Spec, seed: int) -> RawLog:
    """The log as a reader would return it: number n has id n + 1, topics are genres."""
    columns = event_columns(spec, seed)
    events = pl.DataFrame(
        {
            "user_id": columns["user"].astype(np.int64) + 1,
            "item_id": columns["item"].astype(np.int64) + 1,
            "rating": columns["rating"],
            "time": columns["time"],
        }
    )
    return RawLog(_user_frame(spec, seed), _item_frame(spec, seed), events)


def _user_frame(spec: Spec, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng([seed, _USERS])

    def drawn(words: tuple[str, ...]) -> Any:
        return np.array(words)[rng.integers(len(words), size=spec.num_users)]

    return pl.DataFrame(
        {
            "user_id": np.arange(1, spec.num_users + 1),
            "gender": drawn(("male", "female")),
            "age": drawn(_AGES),
            "occupation": drawn(_OCCUPATIONS),
        }
    )


def _item_frame(spec: Spec, seed: int) -> pl.DataFrame:
    number = np.arange(spec.num_items)
    names = GENRES[1:]
    genres = [
        names[topic % len(names)] + (f" {topic // len(names) + 1}" if topic >= len(names) else "")
        for topic in range(spec.num_topics)
    ]
    genre = np.array(genres)[item_topics(spec, seed)]
    words = {
        "adjective": np.array(_ADJECTIVES)[number % len(_ADJECTIVES)],
        "noun": np.array(_NOUNS)[number // len(_ADJECTIVES) % len(_NOUNS)],
        "volume": number // (len(_ADJECTIVES) * len(_NOUNS)) + 1,
        "year": 1950 + number % 50,
    }
    title = pl.format("The {} {} {} ({})", "adjective", "noun", "volume", "year")
    return pl.DataFrame({"item_id": number + 1, **words, "genre": genre}).select(
        "item_id", title.alias("title"), "genre", pl.col("genre").alias("genres")
    )


def _lengths(spec: Spec, rng: np.random.Generator) -> Ints:
    """Events of every user: `min_events` plus a lognormal, capped, with the exact sum."""
    normal = rng.standard_normal(spec.num_users)
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        total = _capped(spec, normal, middle).sum()
        low, high = (middle, high) if total < spec.num_events else (low, middle)
    lengths = _capped(spec, normal, low)
    while missing := spec.num_events - int(lengths.sum()):
        room = lengths < spec.max_events if missing > 0 else lengths > spec.min_events
        chosen = rng.permutation(np.flatnonzero(room))[: abs(missing)]
        lengths[chosen] += np.sign(missing)
    return lengths


def _capped(spec: Spec, normal: NDArray[np.float64], location: float) -> Ints:
    beyond = np.exp(np.minimum(location + spec.spread * normal, 40.0))
    lengths: Ints = np.minimum(spec.min_events + beyond, spec.max_events).astype(np.int64)
    return lengths


def _unit(rows: Floats) -> Floats:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _walk(rng: Any, users: Any, items: Any, taste: Any, columns: Any) -> None:
    """Fill the event columns, session by session and user by user."""
    user_start, life, begin = users
    by_topic, topic_start, quality = items
    num_interests, mean_session, drift, head, tail = taste
    item, rating, time = columns
    num_topics = topic_start.size - 1
    rated_by = np.full(by_topic.size, -1, np.int64)
    likes = np.empty(num_interests, np.int64)
    for user in range(user_start.size - 1):
        row, end = user_start[user], user_start[user + 1]
        pause = life[user] * mean_session / (end - row)
        now = begin[user]
        unrated = by_topic.size
        for n in range(num_interests):
            likes[n] = rng.integers(0, num_topics)
        while row < end:
            if rng.random() < drift:
                likes[rng.integers(0, num_interests)] = rng.integers(0, num_topics)
            lead = likes[rng.integers(0, num_interests)]
            stop = min(end, row + 1 + np.int64(rng.standard_exponential() * (mean_session - 1)))
            while row < stop:
                kind = rng.random()
                topic = lead if kind < 0.6 else rng.integers(0, num_topics)
                if 0.6 <= kind < 0.8:
                    topic = likes[rng.integers(0, num_interests)]
                chosen, topic = _draw(
                    rng, topic, (by_topic, topic_start, head, tail), rated_by, user, unrated
                )
                # Nearly half of the events share their second, as when a page of items is rated.
                if rng.random() > 0.45 or rated_by[chosen] == user:
                    now += 1 + np.int64(30 * rng.standard_exponential())
                unrated -= rated_by[chosen] != user
                rated_by[chosen] = user
                liked = False
                for n in range(num_interests):
                    liked |= likes[n] == topic
                mean = (3.9 if liked else 2.4) + quality[chosen]
                score = np.rint(mean + 0.7 * rng.standard_normal())
                item[row], time[row] = chosen, now
                rating[row] = min(max(score, 1.0), 5.0)
                row += 1
            now += 1 + np.int64(pause * rng.standard_exponential())
        _sort_ties(user_start[user], end, item, rating, time)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _draw(
    rng: Any, topic: Any, catalogue: Any, rated_by: Any, user: Any, unrated: Any
) -> tuple[Any, Any]:
    """An item the user has not rated and its topic: the one asked for, else any; a rated item when
    none is left.
    """
    by_topic, topic_start, head, tail = catalogue
    for attempt in range(_TRIES):
        if attempt >= 4:
            topic = rng.integers(0, topic_start.size - 1)
        size = topic_start[topic + 1] - topic_start[topic]
        # Inverse of the distribution function of a density like (rank + head)^-tail.
        below = 1.0 - rng.random() * (1.0 - (1.0 + size / head) ** (1.0 - tail))
        rank = np.int64(head * (below ** (1.0 / (1.0 - tail)) - 1.0))
        place = topic_start[topic] + min(rank, size - 1)
        if unrated == 0 or rated_by[by_topic[place]] != user:
            return by_topic[place], topic
    place = rng.integers(0, by_topic.size)
    while rated_by[by_topic[place]] == user:
        place = (place + 1) % by_topic.size
    return by_topic[place], np.searchsorted(topic_start, place, side="right") - 1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _sort_ties(start: Any, end: Any, item: Any, rating: Any, time: Any) -> None:
    """Put events of one second in the order of their items, by insertion: ties are short."""
    for row in range(start + 1, end):
        kept_item, kept_rating = item[row], rating[row]
        other = row - 1
        while other >= start and time[other] == time[row] and item[other] > kept_item:
            item[other + 1], rating[other + 1] = item[other], rating[other]
            other -= 1
        item[other + 1], rating[other + 1] = kept_item, kept_rating

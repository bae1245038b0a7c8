"""The recipe's data section: which log, which of its columns, what is a like, how it is split.

It is the one section with a nested part, because your own files call their columns as they like;
and the one with rules across fields, because a log without times cannot do what one with times can.
Other modules import it from `rellax_ds.config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from rellax_ds.section import Fraction, Section

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ITEM_COLUMNS = ("item", "item_id")
_USER_COLUMNS = ("user", "user_id", "event_start", "event_end")


class ColumnsConfig(Section):
    """Which columns of your own files hold what; for `data.dataset: generic`."""

    user: str = Field(default="user_id", description="User id, in the events and the user file.")
    item: str = Field(default="item_id", description="Item id, in the events and the item file.")
    time: str | None = Field(
        default=None, description="Time of an event; null takes the order of rows."
    )
    time_unit: Literal["s", "ms", "iso"] = Field(
        default="s", description="Seconds or milliseconds since 1970, or ISO 8601 text."
    )
    rating: str | None = Field(default=None, description="Rating, a number; or give label.")
    label: str | None = Field(default=None, description="Like, 0 or 1; or give rating.")
    item_text: dict[str, str] = Field(
        default={}, description="Text fields of an item: name (title, genre, ...) to column."
    )
    user_fields: dict[str, str] = Field(
        default={}, description="Profile fields of a user: name to column."
    )
    separator: Literal[",", ";", "|", "\t"] | None = Field(
        default=None, description="Of text files; null follows the file's ending."
    )

    @model_validator(mode="after")
    def _names_are_free(self) -> ColumnsConfig:
        if (self.rating is None) == (self.label is None):
            raise ValueError("name one of the columns rating and label, and not both")
        for section, taken in (("item_text", _ITEM_COLUMNS), ("user_fields", _USER_COLUMNS)):
            for name in getattr(self, section):
                if name in taken or not name.isidentifier():
                    raise ValueError(
                        f"{section} cannot be called '{name}'; choose a word other than "
                        f"{', '.join(taken)}"
                    )
        return self


class DataConfig(Section):
    """Stage 1: which log, what counts as a like, and how the samples are split."""

    dataset: Literal[
        "movielens-100k",
        "movielens-1m",
        "movielens-25m",
        "movielens-latest",
        "bookcrossing",
        "generic",
    ] = "movielens-100k"
    path: Path | None = Field(
        default=None,
        description="Folder with the raw files; by default the named asset is resolved.",
    )
    events: Path | None = Field(
        default=None, description="generic: event file (CSV, TSV, Parquet, RecBole), below path."
    )
    items: Path | None = Field(default=None, description="generic: item file, optional.")
    users: Path | None = Field(default=None, description="generic: user file, optional.")
    columns: ColumnsConfig | None = Field(default=None, description="generic: what columns hold.")
    label_threshold: float = Field(
        default=3.0, description="A rating above this is a like (label 1)."
    )
    label_inclusive: bool = Field(
        default=False, description="A rating equal to the threshold is a like too."
    )
    drop_implicit: bool = Field(
        default=False, description="bookcrossing: leave out ratings of 0, which are no ratings."
    )
    min_history: int = Field(
        default=5,
        ge=1,
        description="A user's first events, which are history only and never a target.",
    )
    split: tuple[Fraction, Fraction, Fraction] = Field(
        default=(0.8, 0.1, 0.1), description="Shares of train, valid and test."
    )
    split_by: Literal["time", "user"] = Field(
        default="time",
        description="Split the samples in time order, or whole users in shuffled order.",
    )
    split_seed: int = Field(
        default=42, ge=0, le=2**31 - 1, description="Shuffles the users of split_by user."
    )
    samples_per_user: Literal["all", "last"] = Field(
        default="all", description="split_by user: every event with enough history, or the last."
    )
    strict_time: bool = Field(
        default=False, description="Leave events of the target's own second out of its history."
    )
    freeze_history: bool = Field(
        default=False, description="End every history at the last training event."
    )

    @field_validator("split")
    @classmethod
    def _split_sums_to_one(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(value) - 1.0) > 1e-9 or min(value) <= 0:
            raise ValueError("the three shares must be positive and sum to 1")
        return value

    @model_validator(mode="after")
    def _log_is_described(self) -> DataConfig:
        generic = self.dataset == "generic"
        if generic and (self.events is None or self.columns is None):
            raise ValueError("dataset generic needs data.events and data.columns")
        if generic and self.columns is not None:
            if self.users is None and self.columns.user_fields:
                raise ValueError("columns.user_fields are read from data.users; give that file")
            if self.items is None and self.columns.item_text:
                raise ValueError("columns.item_text is read from data.items; give that file")
        given = [name for name in ("events", "items", "users", "columns") if getattr(self, name)]
        if given and not generic:
            raise ValueError(f"{given[0]} belongs to dataset generic, this is {self.dataset}")
        if self.path is None and self.dataset not in {"movielens-100k", "generic"}:
            raise ValueError(
                f"dataset {self.dataset} is not fetched by name; set data.path to the folder with "
                "its files"
            )
        if self.drop_implicit and self.dataset != "bookcrossing":
            raise ValueError(f"drop_implicit belongs to bookcrossing, this is {self.dataset}")
        return self

    @model_validator(mode="after")
    def _split_fits_the_log(self) -> DataConfig:
        if self.split_by == "time":
            if self.samples_per_user == "last":
                raise ValueError("samples_per_user last needs split_by user")
            if not self.has_time:
                raise ValueError(
                    "the events have no times, so they cannot be split by time; set split_by user"
                    + (" or columns.time" if self.dataset == "generic" else "")
                )
        elif self.freeze_history:
            raise ValueError(
                "freeze_history ends histories where training ends in time; it needs split_by time"
            )
        if self.strict_time and not self.has_time:
            raise ValueError("strict_time needs times, and the events have none")
        return self

    @property
    def has_time(self) -> bool:
        """Whether events have times; otherwise `time` is a position in the user's own order."""
        if self.dataset == "generic":
            return self.columns is not None and self.columns.time is not None
        return self.dataset != "bookcrossing"

    @property
    def like_rule(self) -> str:
        """The rule for a like as it follows the words "a rating": "above 3", "of 5 or more"."""
        if self.columns is not None and self.columns.label is not None:
            return "of 1"
        if self.label_inclusive:
            return f"of {self.label_threshold:g} or more"
        return f"above {self.label_threshold:g}"

    def likes(self, rating: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which ratings are likes; a label column was read as ratings 0 and 1."""
        if self.columns is not None and self.columns.label is not None:
            return rating > 0
        if self.label_inclusive:
            return rating >= self.label_threshold
        return rating > self.label_threshold

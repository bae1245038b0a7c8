"""The recipe's crm section: which recommender, how it is trained, and which rows it never sees.

A file of its own, as the data section, because it has rules across fields. Other modules import it
from `rellax_ds.config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rellax_ds.section import Fraction, PositiveFloat, PositiveInt, Section

CRMKind = Literal[
    "din", "sim", "sim_full", "dien", "sasrec", "gru4rec", "caser", "deepfm", "dcnv2", "autoint"
]

CRM_NAMES: dict[CRMKind, str] = {
    "din": "DIN",
    "sim": "SIM",
    "sim_full": "two-stage SIM",
    "dien": "DIEN",
    "sasrec": "SASRec",
    "gru4rec": "GRU4Rec",
    "caser": "Caser",
    "deepfm": "DeepFM",
    "dcnv2": "DCN-V2",
    "autoint": "AutoInt",
}
"""What each kind is called in a report."""


class CRMConfig(Section):
    """Stage 4: the conventional recommender whose embeddings feed SPA and CFLoRA."""

    kind: CRMKind = Field(
        default="din", description="See docs/recommenders.md; sim is DIN on retrieved history."
    )
    history_length: PositiveInt = Field(default=30, description="Behaviours the recommender reads.")
    user_id_field: bool = Field(
        default=False,
        description="Give the user id an embedding; useless for users unseen in train.",
    )
    identifier_share: Fraction = Field(
        default=0.5,
        description="A column with more distinct values per row is an identifier and is not read.",
    )
    embedding_dim: PositiveInt = 32
    hidden_dim: PositiveInt = 64
    num_hidden_layers: PositiveInt = 2
    num_attention_layers: PositiveInt = 1
    num_heads: PositiveInt = Field(default=2, description="Of sasrec, autoint and sim_full.")
    num_blocks: PositiveInt = Field(
        default=2, description="Repeated layers of sasrec, gru4rec, dcnv2 and autoint."
    )
    search: Literal["hard", "soft"] = Field(
        default="hard", description="sim_full's search: same category, or a learned product."
    )
    search_field: str = Field(default="genre", description="Item column that is the category.")
    search_length: PositiveInt = Field(default=10, description="Behaviours the search leaves.")
    auxiliary_weight: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="Weight of the losses that dien and the soft search have."
    )
    dropout: Fraction = 0.1
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    batch_size: PositiveInt = 256
    max_epochs: PositiveInt = 10
    patience: PositiveInt = Field(
        default=2, description="Epochs without a better valid AUC before training stops."
    )
    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0,
        description="Latest share of train kept from the recommender: rows the LLM can learn on.",
    )
    folds: Annotated[int, Field(ge=0, le=100)] = Field(
        default=0,
        description="Give a training row what a recommender that did not see it says: so many more "
        "are trained, each without its fold. 0: all rows come from the one.",
    )
    fold_by: Literal["user", "time"] = Field(
        default="user",
        description="Folds of whole users, or blocks of time, each scored by a recommender of the "
        "earlier ones (the first block is not used then).",
    )
    instance_embedding: Literal["final", "hidden", "user"] = Field(
        default="final", description="Which activation is h."
    )

    @model_validator(mode="after")
    def _folds_defined(self) -> CRMConfig:
        if self.folds == 1:
            raise ValueError("folds 1 leaves nothing to train on; use at least 2, or 0 for none")
        if self.folds and self.holdout:
            raise ValueError(
                f"folds {self.folds} and holdout {self.holdout:g} both keep rows from the "
                "recommender; use one of them"
            )
        return self

    @model_validator(mode="after")
    def _kind_defined(self) -> CRMConfig:
        if self.kind in {"sasrec", "autoint", "sim_full"} and self.embedding_dim % self.num_heads:
            raise ValueError(
                f"embedding_dim {self.embedding_dim} is no multiple of num_heads {self.num_heads}"
            )
        if self.kind == "sim_full" and self.search_length > self.history_length:
            raise ValueError(
                f"search_length {self.search_length} is more than the history_length "
                f"{self.history_length} that is searched"
            )
        return self

    @property
    def searches_by_category(self) -> bool:
        """Whether the recommender compares categories."""
        return self.kind == "sim_full" and self.search == "hard"

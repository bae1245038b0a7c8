"""The family of interaction matrices: which kinds of M(h) exist, their sizes, and what is refused.

It lies below the model, without torch, so that a recipe and an adapter's own configuration are held
to the same rules before anything is loaded. The matrices themselves are in
`rellax_ds.model.interaction`.

One convention for every kind: `rank` R is the rank of A [R, d_in] and B [d_out, R], all experts
together, and the update is scaled by s = alpha / R. N experts are N bands of R / N rows of A and
columns of B. A method published with N banks of rank r and s = alpha / r is therefore R = N r with
alpha N times as large.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from rellax_ds.errors import ConfigError

Kind = Literal[
    "identity",
    "scalar",
    "diag",
    "block",
    "block_full",
    "moe",
    "rec_sum",
    "rec_prod",
    "full",
    "full_static",
]
Init = Literal["identity", "reference"]
Head = Literal["mlp", "factorised"]

ROUTED = ("block", "moe", "rec_sum", "rec_prod")
"""Kinds whose coefficients are a softmax over experts."""

EXPERTS = (*ROUTED, "block_full")
"""Kinds that cut the rank into experts."""

STATIC = ("identity", "full_static")
"""Kinds whose M is the same for every sample."""

METHODS = {
    "identity": "LoRA",
    "scalar": "gated LoRA",
    "diag": "diagonal LoRA",
    "block": "iLoRA",
    "block_full": "block LoRA",
    "moe": "MoELoRA",
    "rec_sum": "RecLoRA (sum)",
    "rec_prod": "RecLoRA",
    "full": "CFLoRA",
    "full_static": "static CFLoRA",
}
"""What each kind is called in a report."""

MAX_MLP_OUTPUTS = 32 * 32
"""Most entries of M the MLP head computes at its default width, which is twice their number: its
parameters grow with their square, 2 r^4 for a full M.
"""

_HIDDEN = 64
_FACTORS = 4


@dataclass(frozen=True)
class InteractionSpec:
    """Everything that fixes the shape and the start of M(h), except the number of layers and |h|.

    Attributes:
        kind: Which entries of M are free and how they follow from h.
        rank: R, the rank of A and B, all experts together.
        experts: N, for the kinds that cut the rank into experts.
        init: `identity`: the last layer of the head is zero, and M = I + f(h) unless the kind has a
            router, whose experts then start with equal weight; `reference`: M = f(h), torch's
            Kaiming start with zero biases.
        head: `mlp` computes each free entry; `factorised` computes U, V [R, q] of M = I + U V^T.
        hidden: Width of the head's hidden layer; None chooses it, see `width`.
        factors: q; None is 4, or the rank if that is smaller.
        temperature: Divides the router's logits.
        shared: One router serves all layers.
        scale: Multiplies what the head computes, f in M = I + f; a kind with a router has none. It
            acts like a learning rate of M - I that weight decay does not see.

    Raises:
        ConfigError: The combination is not defined; names the field, the value and the remedy.
    """

    kind: Kind
    rank: int
    experts: int = 4
    init: Init = "identity"
    head: Head = "mlp"
    hidden: int | None = None
    factors: int | None = None
    temperature: float = 1.0
    shared: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what the method does not define."""
        _check_choice("interaction", self.kind, get_args(Kind))
        _check_choice("interaction_init", self.init, get_args(Init))
        _check_choice("interaction_head", self.head, get_args(Head))
        if self.kind in EXPERTS and (self.experts < 1 or self.rank % self.experts):
            raise ConfigError(
                f"interaction_experts {self.experts} does not divide the rank {self.rank}, which "
                "counts all experts together; change one of them"
            )
        if self.shared and not self.routed:
            raise ConfigError(
                f"interaction_shared is for kinds with a router ({', '.join(ROUTED)}), interaction "
                f"is {self.kind}; leave it false"
            )
        if self.routed and not self.temperature > 0:
            raise ConfigError(
                f"interaction_temperature is {self.temperature}; it divides logits and must be "
                "above 0"
            )
        if self.scale != 1.0 and (self.routed or self.kind == "identity" or self.scale <= 0):
            raise ConfigError(
                f"interaction_scale is {self.scale:g} with interaction {self.kind}; it must be "
                f"above 0, and 1 for identity and for kinds with a router ({', '.join(ROUTED)})"
            )
        if self.head == "factorised":
            self._check_factorised()
        elif self.hidden is None and self.outputs > MAX_MLP_OUTPUTS:
            raise ConfigError(
                f"interaction {self.kind} at rank {self.rank} has {self.outputs} entries in M, too "
                f"many for the mlp head at its default width (limit {MAX_MLP_OUTPUTS}, rank 32 for "
                "a full M); set interaction_head to factorised or give interaction_hidden"
            )
        if self.kind == "full_static" and self.init == "reference":
            raise ConfigError(
                "interaction full_static starts at the identity only; set interaction_init to "
                "identity"
            )

    @classmethod
    def of(cls, settings: object, rank: int) -> InteractionSpec:
        """The spec of a recipe's model section or of an adapter's configuration, which name these
        fields alike (`INTERACTION_FIELDS`).
        """
        values = {name: getattr(settings, name) for name in INTERACTION_FIELDS}
        kind = values.pop("interaction")
        named = {name.removeprefix("interaction_"): value for name, value in values.items()}
        return cls(kind=kind, rank=rank, **named)

    @property
    def function(self) -> str:
        """What parameters of given shapes compute, in words: two specs with the same shapes and
        the same words give the same M(h).
        """
        words = [self.kind, self.head, "with I" if self.residual else "without I"]
        if self.kind in EXPERTS:
            words.append(f"{self.experts} experts")
        if self.routed:
            words.append(f"temperature {self.temperature:g}")
        if self.scale != 1.0:
            words.append(f"scale {self.scale:g}")
        return ", ".join(words)

    @property
    def routed(self) -> bool:
        """Whether M's coefficients are a softmax over experts."""
        return self.kind in ROUTED

    @property
    def input_independent(self) -> bool:
        """Whether M is the same for every sample, so that the adapter equals some plain LoRA."""
        return self.kind in STATIC

    @property
    def residual(self) -> bool:
        """Whether I is added to what the head computes."""
        return self.init == "identity" and not self.routed

    @property
    def outputs(self) -> int:
        """Numbers the head computes for one layer and sample; 0 for a static kind."""
        if self.head == "factorised":
            return 2 * self.factor_rank * self.rank
        if self.routed:
            return self.experts
        sizes = {"scalar": 1, "diag": self.rank, "full": self.rank**2}
        if self.kind == "block_full":
            return self.rank**2 // self.experts
        return sizes.get(self.kind, 0)

    @property
    def width(self) -> int:
        """Width of the head's hidden layer: `hidden`, or 2 r^2 as published for the MLP heads of
        dense matrices (twice the free entries of M) and 64 for all others.
        """
        if self.hidden is not None:
            return self.hidden
        dense = self.kind in ("full", "block_full") and self.head == "mlp"
        return 2 * self.outputs if dense else _HIDDEN

    @property
    def factor_rank(self) -> int:
        """q, the rank of M - I under the factorised head."""
        return min(_FACTORS, self.rank) if self.factors is None else self.factors

    def _check_factorised(self) -> None:
        if self.kind != "full" or self.init != "identity":
            raise ConfigError(
                "interaction_head factorised computes M = I + U V^T and needs interaction full and "
                f"interaction_init identity, they are {self.kind} and {self.init}"
            )
        if not 1 <= self.factor_rank <= self.rank:
            raise ConfigError(
                f"interaction_factors {self.factors} is not between 1 and the rank {self.rank}"
            )


INTERACTION_FIELDS = (
    "interaction",
    *(f"interaction_{f.name}" for f in fields(InteractionSpec) if f.name not in ("kind", "rank")),
)
"""Names of the spec's fields in a recipe's model section and in an adapter's configuration."""


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field} '{value}' is unknown; choose {', '.join(choices)}")

"""Batch: the only type that crosses from the data path to the compute path.

Collation makes it, the model reads it; neither knows the other. Prompts lie end to end without
padding, so slots and answers are positions in that one row of tokens and nothing is padded at all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HOST = frozenset({"lengths", "question_starts", "users"})
"""Fields that stay on the CPU."""


@dataclass(frozen=True)
class Batch:
    """Prompts of B samples, packed.

    T tokens in all, N soft-token slots, M supervised answer positions, E width of the recommender's
    item embeddings, H width of its instance embedding.

    Attributes:
        sample_ids: int64 [B], row numbers of `samples`.
        users: int64 [B], user of each sample; on the CPU, for metrics within users.
        input_ids: int64 [T], the prompts one after the other.
        lengths: int64 [B], tokens of each prompt, sum T; on the CPU on every device, because it is
            the host that cuts by it.
        question_starts: int64 [B], tokens of each prompt before its target's question: those up to
            the answer to the history's last question; on the CPU as `lengths`.
        slot_positions: int64 [N], position of each soft-token slot among the T tokens.
        slot_vectors: float32 [N, E], the recommender's item embedding; all zeros for an item unseen
            in training.
        instance: float32 [B, H], the recommender's instance embedding h.
        crm_logits: float32 [B], the recommender's log-odds of a like.
        answer_positions: int64 [M], position among the T tokens whose next token is the answer.
        answer_labels: float32 [M], 1 for yes.
        answer_weights: float32 [M], weight in the loss; those of a sample add up to 1.
        target_index: int64 [B], index into the M answers of each sample's target question.
    """

    sample_ids: torch.Tensor
    users: torch.Tensor
    input_ids: torch.Tensor
    lengths: torch.Tensor
    question_starts: torch.Tensor
    slot_positions: torch.Tensor
    slot_vectors: torch.Tensor
    instance: torch.Tensor
    crm_logits: torch.Tensor
    answer_positions: torch.Tensor
    answer_labels: torch.Tensor
    answer_weights: torch.Tensor
    target_index: torch.Tensor

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.sample_ids.shape[0])

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[0])

    @property
    def labels(self) -> torch.Tensor:
        """Label of each sample's target, float32 [B]."""
        return self.answer_labels[self.target_index]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by field name, as keyword arguments for the model's forward."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        moved = {n: t.to(device) for n, t in self.tensors().items() if n not in HOST}
        return replace(self, **moved)

"""Batch: the only type that crosses from the data path to the compute path.

Collation makes it, the model reads it; neither knows the other. Ragged parts (soft-token slots,
answer positions) are flat tensors with row indices, so a sample may have any number of either and
nothing is padded twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """A padded batch of prompts.

    B samples, L tokens after right padding, N soft-token slots, M supervised answer positions, E
    width of the recommender's item embeddings, H width of its instance embedding.

    Attributes:
        sample_ids: int64 [B], row numbers of `samples`.
        input_ids: int64 [B, L]; padding is any valid id, told apart by `attention_mask` only.
        attention_mask: int64 [B, L], 1 for a token of the prompt.
        slot_rows: int64 [N], row of the batch each soft-token slot belongs to.
        slot_positions: int64 [N], position of the slot in that row.
        slot_vectors: float32 [N, E], the recommender's item embedding; all zeros for an item unseen
            in training.
        instance: float32 [B, H], the recommender's instance embedding h.
        answer_rows: int64 [M], row each supervised answer belongs to.
        answer_positions: int64 [M], position whose next token is the answer.
        answer_labels: float32 [M], 1 for yes.
        answer_weights: float32 [M], weight in the loss; the target's answer has weight 1.
        target_index: int64 [B], index into the M answers of each sample's target question.
    """

    sample_ids: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    slot_rows: torch.Tensor
    slot_positions: torch.Tensor
    slot_vectors: torch.Tensor
    instance: torch.Tensor
    answer_rows: torch.Tensor
    answer_positions: torch.Tensor
    answer_labels: torch.Tensor
    answer_weights: torch.Tensor
    target_index: torch.Tensor

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.sample_ids.shape[0])

    @property
    def labels(self) -> torch.Tensor:
        """Label of each sample's target, float32 [B]."""
        return self.answer_labels[self.target_index]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by field name, as keyword arguments for the model's forward."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

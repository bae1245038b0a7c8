"""The LLM as a correction of the recommender: logit = recommender's logit + w times the LLM's.

w starts at 0, so the untrained system is the recommender to the bit, and what is learned is what
the LLM adds to it. This is ours, not the paper's. It wants logits of training rows that were not
fitted to their labels (`crm.folds`): beside a recommender that has seen the row, nothing seems
worth adding. Answers to the history's own questions have no recommender's logit and are left as
they are, so the LLM learns from them from the first step on.
"""

from __future__ import annotations

import torch
from torch import nn

WEIGHTS = "residual.safetensors"
"""File of an adapter folder that holds the weight."""


class CRMResidual(nn.Module):
    """Blends the target's logit of the LLM with the recommender's.

    Attributes:
        weight: w, [1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, margins: torch.Tensor, crm_logits: torch.Tensor, target_index: torch.Tensor
    ) -> torch.Tensor:
        """Logits of M answers, with those of the B targets blended.

        Args:
            margins: The LLM's centred z_yes - z_no, float32 [M].
            crm_logits: [B].
            target_index: int64 [B], the targets among the M answers.

        Returns:
            float32 [M].
        """
        blended = (
            crm_logits.to(margins.dtype) + self.weight.to(margins.dtype) * margins[target_index]
        )
        return margins.index_put((target_index,), blended)

"""The LLM as a correction of the recommender: a times its logit plus w times the LLM's plus b.

It starts at a = 1, w = b = 0, the recommender to the bit. The three numbers are no trained
parameters: in the few steps of a few-shot training a trained w stayed near 0, and then the LLM
learns nothing from the targets. The training loop fits them on the valid rows each time it scores
them (`rellax_ds.blend`). In between the LLM is trained inside the blend, on what the
recommender leaves unexplained (`model.residual` crm), or by itself, as without a recommender
(stacked). This is ours, not the paper's. It wants logits of training rows that were not fitted to
their labels (`crm.folds`): beside a recommender that has seen the row, nothing seems left to
explain. Answers to the history's own questions have no recommender's logit and are left as they
are.
"""

from __future__ import annotations

import torch
from torch import nn

from rellax_ds.blend import START

LEAST = 0.2
"""Smallest w in training, so that targets always teach the LLM something."""


class CRMResidual(nn.Module):
    """Blends the target's logit of the LLM with the recommender's.

    Attributes:
        blend: a, w, b, buffer [3].
    """

    blend: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blend", torch.tensor(START))

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
        of_crm, of_llm, offset = self.blend.to(margins.dtype).unbind()
        if self.training:
            of_llm = of_llm.clamp(min=LEAST)
        own = of_llm * margins[target_index]
        return margins.index_put(
            (target_index,), of_crm * crm_logits.to(margins.dtype) + own + offset
        )

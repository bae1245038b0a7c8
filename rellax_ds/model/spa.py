"""SPA: the recommender's item embeddings as soft tokens of the prompt.

A two-layer projector maps an item's embedding to the LLM's width, one projector for history and
target (ReLLaX). Items the recommender never saw arrive as all-zero rows and share one learned
vector, since a projection of zeros would be an arbitrary constant with the meaning of no item. The
published projector is a plain MLP with xavier-normal weights; ours rescales its last layer once at
the start, so that a standardised item embedding gives a token of the same root mean square as the
backbone's own word embeddings and the frozen layers meet inputs of the size they know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from rellax_ds.model.tensors import check_tensors, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "spa.safetensors"
"""File of an adapter folder that holds the projector."""

_PROBES = 256


class SoftPromptProjector(nn.Module):
    """Linear(E -> m), GELU, Linear(m -> H) with m = H unless a bottleneck is given.

    Attributes:
        null: [H], the token of items without an embedding.
    """

    def __init__(self, item_dim: int, model_dim: int, bottleneck: int | None = None) -> None:
        super().__init__()
        width = bottleneck or model_dim
        self.input = nn.Linear(item_dim, width)
        self.output = nn.Linear(width, model_dim)
        self.null = nn.Parameter(torch.empty(model_dim))

    def reset_parameters(self, token_rms: float) -> None:
        """Xavier-normal weights, zero biases, last layer and null vector scaled to the backbone's
        embeddings.

        Args:
            token_rms: Root mean square of the entries of the backbone's word embeddings.
        """
        for layer in (self.input, self.output):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.null, std=token_rms)
        with torch.no_grad():
            probes = torch.randn(_PROBES, self.input.in_features).to(self.input.weight)
            rms = self.output(F.gelu(self.input(probes))).float().pow(2).mean().sqrt()
            self.output.weight.mul_(token_rms / rms.item())

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Soft tokens for item embeddings.

        Args:
            vectors: [N, E]; an all-zero row stands for an item without an embedding. N may be 0.

        Returns:
            [N, H] in the projector's type.
        """
        vectors = vectors.to(self.input.weight.dtype)
        tokens = self.output(F.gelu(self.input(vectors)))
        known = vectors.ne(0).any(dim=-1, keepdim=True)
        return torch.where(known, tokens, self.null)


def start_projector(projector: SoftPromptProjector, folder: Path) -> None:
    """Copy a saved projector into a fresh one; a folder without one leaves it as it is.

    Raises:
        CheckpointError: The saved projector has other widths or is damaged.
    """
    path = folder / WEIGHTS
    if not path.exists():
        return
    saved = read_tensors(path)
    wanted = dict(projector.named_parameters())
    check_tensors(saved, wanted, path)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])

"""Caser: the recent history as an image, read by convolutions (Tang and Wang 2018).

The image is one row a behaviour, the latest first, zero where the history is shorter. Horizontal
filters span some consecutive behaviours and are max-pooled over time; vertical filters are weighted
sums over all of them (the paper's section 3.2). The paper reads five behaviours with every height
up to five; here the image is `crm.history_length` high, and heights double so that the number of
filters stays bounded. The user's own embedding, which the paper adds, is a field like any other
(`crm.user_id_field`). How the state becomes a click model stands in `sequence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from rellax_ds.crm.sequence import SequenceRecommender

if TYPE_CHECKING:
    from rellax_ds.crm.network import Architecture, View

_HEIGHTS = (1, 2, 4, 8)
_HORIZONTAL = 16
"""Filters of each height, as published."""
_VERTICAL = 4
"""Filters over the whole image, as published."""


class Caser(SequenceRecommender):
    """Convolutional sequence model, scored against the target."""

    def __init__(self, architecture: Architecture) -> None:
        """Build the filters and the layer that makes their outputs a state."""
        super().__init__(architecture)
        a = architecture
        heights = [height for height in _HEIGHTS if height <= a.history_length]
        self.horizontal = nn.ModuleList(
            nn.Conv1d(a.embedding_dim, _HORIZONTAL, height) for height in heights
        )
        self.vertical = nn.Linear(a.history_length, _VERTICAL, bias=False)
        self.join = nn.Linear(
            _HORIZONTAL * len(heights) + _VERTICAL * a.embedding_dim, a.embedding_dim
        )
        self.add_tower(self.width)

    def state(self, view: View) -> torch.Tensor:
        """State by the filters' outputs side by side."""
        a = self.architecture
        image_BEL, shown_BL = self._image(view)
        outputs = [self.vertical(image_BEL).flatten(1)]
        for convolution in self.horizontal:
            found = F.relu(convolution(image_BEL))
            # A window that begins in the padding holds nothing else; its bias is no finding.
            found = found * shown_BL[:, None, : found.shape[2]]
            outputs.append(found.amax(2))
        joined = F.dropout(torch.cat(outputs, dim=1), a.dropout, self.training)
        return F.relu(self.join(joined)) * shown_BL[:, :1]

    def _image(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """The image [B, E, L], the latest behaviour first, and where it shows one, [B, L]."""
        length = view.mask.shape[1]
        count = view.mask.sum(1, keepdim=True).long()
        place_BL = count - 1 - torch.arange(self.architecture.history_length)
        shown_BL = (place_BL >= 0).to(view.mask.dtype)
        rows = torch.arange(len(count)).unsqueeze(1)
        image_BLE = view.behaviours[rows, place_BL.clamp(0, length - 1)]
        return (image_BLE * shown_BL.unsqueeze(2)).transpose(1, 2), shown_BL

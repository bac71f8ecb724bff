"""The linear connector's module. Shape suffixes: X embeddings, E encoder width, D model width, S spans."""

from __future__ import annotations

import torch
from torch import nn

from megatron_gemini.modalities.transformer import linear


class LinearConnector(nn.Module):
    """One linear layer, with a bias."""

    def __init__(self, width: int, model_width: int) -> None:
        super().__init__()
        # Unlike torch's, it declares how its weights begin: by seed and name, so alike in all layouts.
        self.projection = linear(width, model_width)

    def forward(self, e_XE: torch.Tensor, length_S: torch.Tensor) -> torch.Tensor:
        """[X, D]; length_S is not needed."""
        return self.projection(e_XE)

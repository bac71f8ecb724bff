"""Sinusoids of positions from somebody else's code: VideoMAE's, of transformers."""

from __future__ import annotations

import pytest
import torch


def foreign_sinusoids(positions: int, width: int) -> torch.Tensor:
    """float32[positions, width]: all sines, then all cosines; theirs stand in turn."""
    videomae = pytest.importorskip("transformers.models.videomae.modeling_videomae")
    table_XD = videomae.get_sinusoid_encoding_table(positions, width)[0]
    return torch.cat([table_XD[:, 0::2], table_XD[:, 1::2]], dim=-1)

"""What a decoded sample takes of the cache: what Python keeps of it, and no less, or a budget would be exceeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_gemini.data.samples.decode import field_bytes
from megatron_gemini.data.samples.items import Codes, EncoderInput, Text, Turn
from megatron_gemini.modalities.image.item import Image

IMAGE = Image(np.zeros((6, 4, 3), np.uint8))
INPUT = EncoderInput("image", "vision", "image", torch.zeros(2, 12), (1, 1, 2), 0.0, (2,))


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("four", 2 * 4 + 128),
        (Text("four"), 2 * 4 + 128),
        (Codes("image", (1, 2, 3)), 8 * 3 + 128),
        (IMAGE, 6 * 4 * 3 + 512),
        (INPUT, 2 * 12 * 4 + 512),
        ([Text("a"), IMAGE], 2 + 128 + 72 + 512),
        (Turn(True, [Text("a"), IMAGE]), 2 + 128 + 72 + 512),
    ],
)
def test_a_field_costs_its_content_and_the_objects_around_it(value, size):
    assert field_bytes(value) == size


def test_inputs_are_told_apart_by_identity():
    """To compare arrays has no one answer, and would cost more than to prepare them."""
    twin = EncoderInput("image", "vision", "image", INPUT.values_PC, (1, 1, 2), 0.0, (2,))
    assert twin != INPUT
    assert len({INPUT, twin, INPUT}) == 2

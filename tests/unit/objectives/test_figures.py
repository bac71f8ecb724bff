"""Figures of packed rows: tokens by kind, documents by source."""

from __future__ import annotations

import torch

from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.objectives.figures import count_tokens, mixture_of, token_kinds, token_shares


def test_tokens_are_counted_by_kind_without_padding():
    layout = TokenLayout(10, (("image", 4),))
    control = layout.control
    tokens = [control("bos"), 3, control("image"), control("image"), control("video"), control("audio")]
    tokens += [
        control("image_begin"),
        layout.code_range("image").start,
        layout.size - 1,
        control("eos"),
        control("pad"),
        5,
    ]
    token_T = torch.tensor(tokens)
    segment_T = torch.tensor([1] * 10 + [0, 0], dtype=torch.int32)
    zeros = torch.zeros_like(token_T)
    batch = Batch(token_T, zeros, zeros.float(), zeros, segment_T, zeros.int(), zeros.to(torch.int8))
    counts = count_tokens([batch, batch], layout)
    assert counts == {"text": 8, "image_codes": 4, "image": 4, "video": 2, "audio": 2}
    assert tuple(counts) == token_kinds(layout)
    shares = token_shares(counts)
    assert shares["tokens"] == 20
    assert shares["share_text"] == 0.4
    assert token_shares(count_tokens([], layout))["share_text"] == 0


def test_the_mixture_of_a_row_is_counted_by_source_even_where_one_name_begins_another():
    empty = torch.zeros(10, dtype=torch.int64)
    segment = torch.tensor([1, 1, 1, 2, 2, 3, 4, 4, 0, 0], dtype=torch.int32)
    samples = ["web/en/1", "web/2", "web/en/3", "other/4"]
    row = Batch(empty, empty, empty, empty, segment, empty, empty, samples=samples)
    assert mixture_of([row, row], ["web", "web/en", "unused"]) == {
        "documents/web": 2,
        "documents/web/en": 4,
        "documents/unused": 0,
        "tokens/web": 4,
        "tokens/web/en": 8,
        "tokens/unused": 0,
    }

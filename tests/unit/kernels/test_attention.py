"""Attention equals a dense float64 reference by the mask rule of contracts.Batch, and documents are sealed off."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.attention import attention, attention_backend, attention_output, plan_attention
from megatron_gemini.kernels.attention_plan import MAX_WASTE
from megatron_gemini.kernels.attention_sdpa import attend_by_sdpa
from megatron_gemini.kernels.rope import rotate, rotation


def sees(segment, span):
    """[T, T] of the mask rule, written as the contract says it."""
    place = torch.arange(len(segment))
    causal = place[None, :] <= place[:, None]
    bidirectional = (span[:, None] == span[None, :]) & (span[:, None] != 0)
    return (segment[:, None] == segment[None, :]) & (segment[:, None] != 0) & (causal | bidirectional)


def reference(q, k, v, segment, span, scale=None):
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    mask = sees(segment, span)
    score = torch.einsum("inh,jnh->nij", q, k) * (scale or q.shape[-1] ** -0.5)
    weight = torch.softmax(score.masked_fill(~mask, -1e300), -1) * mask
    return torch.einsum("nij,jnh->inh", weight, v)


def row(lengths, spans, padding):
    """segment_T and span_T of documents of `lengths`, with (begin, end) spans, and padding at the end."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths, dtype=torch.int64))
    segment = torch.cat((segment, torch.zeros(padding, dtype=torch.int64))).int()
    span = torch.zeros_like(segment)
    for number, (begin, end) in enumerate(spans):
        span[begin:end] = number + 1
    return segment, span


def heads(tokens, query, key, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (query, key, key)
    return [torch.randn(tokens, n, width, generator=generator).requires_grad_() for n in shapes]


def assert_equals_reference(segment, span, query=4, key=1, scale=None, attend=attention):
    q, k, v = heads(len(segment), query, key)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = attend(q, k, v, plan_attention(segment, span), scale)
    wanted = reference(q, k, v, segment, span, scale)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    assert (out[segment == 0] == 0).all()
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@st.composite
def rows(draw):
    """Documents, each with spans that may be adjacent, at its edges or all of it; padding behind them."""
    lengths, spans, begin = draw(st.lists(st.integers(1, 12), max_size=6)), [], 0
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)) | {0, length})
        for first, last in pairwise(cuts):
            if draw(st.booleans()):
                spans.append((begin + first, begin + last))
        begin += length
    return row(lengths, spans, draw(st.integers(0, 4)))


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from([(4, 1), (4, 2), (3, 3)]))
def test_any_row_equals_the_dense_reference_forward_and_backward(segment_and_span, counts):
    assert_equals_reference(*segment_and_span, *counts)


@settings(max_examples=30, deadline=None)
@given(rows())
def test_the_sdpa_path_that_other_devices_take_equals_the_reference(segment_and_span):
    segment, span = segment_and_span
    if len(segment) and segment[0] != 0:
        assert_equals_reference(
            segment, span, attend=lambda q, k, v, plan, scale: attend_by_sdpa(q, k, v, plan, scale, None)
        )


@pytest.mark.parametrize(
    ("lengths", "spans", "padding"),
    [
        ([], [], 0),
        ([], [], 5),
        ([1], [], 0),
        ([1, 1, 1], [], 2),
        ([7], [], 3),
        ([5, 5, 5], [(0, 5), (5, 10), (10, 15)], 0),
        ([5, 3], [(0, 5), (5, 8)], 1),
        ([9], [(0, 3), (3, 6), (6, 9)], 0),
    ],
)
def test_edge_rows_equal_the_reference(lengths, spans, padding):
    assert_equals_reference(*row(lengths, spans, padding))


def test_another_scale_is_used():
    assert_equals_reference(*row([6, 3], [], 0), scale=0.7)


@pytest.mark.parametrize("attend", [attention, attend_by_sdpa])
def test_rotation_within_attention_equals_rotation_before_it(attend):
    segment, span = row([6, 4], [(1, 3)], 2)
    turn = rotation(torch.arange(12) % 6, 8, 10000.0, torch.float32)
    plan = plan_attention(segment, span)
    inputs, twins = heads(12, 4, 1), heads(12, 4, 1)
    out = attend(*inputs, plan, None, turn)
    wanted = attention(rotate(twins[0], turn), rotate(twins[1], turn), twins[2], plan)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, twins, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[12], [5, 4], []])
def test_attention_output_equals_attention_then_product_then_sum(lengths):
    segment, span = row(lengths, [], 12 - sum(lengths))
    turn = rotation(torch.arange(12), 8, 10000.0, torch.float32)
    plan = plan_attention(segment, span)
    weight, residual = torch.randn(16, 32, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    inputs = [*heads(12, 4, 1), weight, residual]
    out = attention_output(*inputs[:3], plan, turn, weight, residual)
    wanted = residual + attention(*inputs[:3], plan, turn=turn).flatten(1) @ weight.T
    grad = torch.randn(out.shape)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spans", [[], [(0, 6), (6, 9), (9, 16)], [(7, 9)]])
@pytest.mark.parametrize("poison", [0, 1, 2])
def test_a_nan_in_one_document_reaches_no_other(spans, poison):
    lengths = [6, 3, 7]
    segment, span = row(lengths, spans, 2)
    bad = segment == poison + 1
    q, k, v = heads(len(segment), 4, 1)
    grad = torch.ones_like(q)
    with torch.no_grad():
        for x in (q, k, v, grad):
            x[bad] = torch.nan
    out = attention(q, k, v, plan_attention(segment, span))
    assert out[~bad].isfinite().all()
    for gradient in torch.autograd.grad(out, (q, k, v), grad):
        assert gradient[~bad].isfinite().all()


@settings(max_examples=50, deadline=None)
@given(rows())
def test_buckets_hold_every_token_once_and_little_padding(segment_and_span):
    plan = plan_attention(*segment_and_span)
    if plan.gather is None:
        return
    real = int((segment_and_span[0] != 0).sum())
    assert plan.gather[plan.scatter].tolist() == list(range(real))
    start = 0
    for slots in plan.slots:
        held = ((plan.scatter >= start) & (plan.scatter < start + slots)).sum()
        assert slots - held <= MAX_WASTE * slots
        start += slots


def test_causal_documents_and_frames_of_one_size_need_neither_mask_nor_gather():
    causal = plan_attention(*row([9], [], 2))
    assert causal.gather is None and causal.buckets[0].causal and causal.buckets[0].mask is None
    frames = plan_attention(*row([4, 4, 4], [(0, 4), (4, 8), (8, 12)], 0))
    assert frames.gather is None and frames.buckets[0].mask is None and frames.buckets[0].documents == 3
    ragged = plan_attention(*row([20, 19, 18], [], 0))
    assert len(ragged.buckets) == 1 and ragged.buckets[0].mask is None


def test_padding_before_a_document_is_an_error():
    with pytest.raises(ValueError, match="padding"):
        plan_attention(torch.tensor([1, 0, 2]), torch.zeros(3))


def test_bfloat16_stays_near_the_reference():
    segment, span = row([6, 5], [(1, 4)], 1)
    q, k, v = (x.detach().bfloat16() for x in heads(12, 4, 1))
    out = attention(q, k, v, plan_attention(segment, span))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), reference(q, k, v, segment, span), rtol=0.03, atol=0.03)


def test_the_backend_says_what_it_is_and_why():
    name, reason = attention_backend(torch.device("cpu"))
    assert "CPU" in name and reason
    assert attention_backend(torch.device("cuda"))[0] != name

"""Attention equals a dense float64 reference by the mask rule of contracts.Batch, and documents are sealed off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.attention import documents
from megatron_gemini.kernels.attention.api import (
    attention,
    attention_backend,
    attention_with_lse,
    merge_attention,
    plan_attention,
)
from megatron_gemini.kernels.attention.cpu import calls
from megatron_gemini.kernels.attention.documents import MAX_WASTE
from megatron_gemini.kernels.attention.reference import attend_densely
from megatron_gemini.kernels.attention.sdpa import attend_by_sdpa
from megatron_gemini.kernels.rope import CosSin, apply_rope, rope_cos_sin
from tests.attention_rows import heads, row, rows, rows_and_queries


@pytest.fixture(params=[False, True], ids=["as short", "as long"])
def short_or_long(request, monkeypatch):
    """With calls that cost nothing, short documents are cut into runs and blocks as long ones are."""
    if request.param:
        monkeypatch.setattr(documents, "CALL_PAIRS", 0)
        monkeypatch.setattr(calls, "CALL_PAIRS", 0)
        monkeypatch.setattr(calls, "BLOCK", 3)


def sdpa(q, k, v, plan, scale=None, cos_sin=None):
    if plan.empty:
        return attention(q, k, v, plan, scale, cos_sin)
    return attend_by_sdpa(q, k, v, plan, scale, cos_sin)[0]


def assert_equals_reference(segment, span, query=4, key=1, scale=None, attend=attention, query_Q=None):
    plan = plan_attention(segment, span, query_Q)
    q, k, v = heads(len(segment), query, key, queries=plan.queries)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = attend(q, k, v, plan, scale)
    wanted, _ = attend_densely(q.double(), k.double(), v.double(), plan, scale)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    padding = segment == 0 if query_Q is None else segment[query_Q] == 0
    assert (out[padding] == 0).all()
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad.double()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attend", [attention, sdpa])
@pytest.mark.usefixtures("short_or_long")
@settings(max_examples=40, deadline=None)
@given(rows(), st.sampled_from([(4, 1), (4, 2), (3, 3)]))
def test_any_row_equals_the_dense_reference_forward_and_backward(attend, segment_and_span, counts):
    assert_equals_reference(*segment_and_span, *counts, attend=attend)


@pytest.mark.parametrize("attend", [attention, sdpa])
@pytest.mark.usefixtures("short_or_long")
@settings(max_examples=60, deadline=None)
@given(rows_and_queries(), st.sampled_from([(4, 1), (4, 2)]))
def test_any_part_of_a_rows_queries_equals_the_dense_reference(attend, given_row, counts):
    segment, span, query = given_row
    assert_equals_reference(segment, span, *counts, attend=attend, query_Q=query)


@pytest.mark.parametrize("sign", [1, -1])
def test_any_number_but_zero_names_a_span(sign):
    segment, span = row([7, 8], [(1, 4), (8, 11)], 1)  # one bucket, in which the first document is filled up
    assert_equals_reference(segment, sign * span)


@settings(max_examples=30, deadline=None)
@given(rows(), st.integers(1, 4))
def test_ranks_that_divide_the_queries_have_the_rows_output_and_their_key_gradients_sum_to_its(segment_and_span, ranks):
    segment, span = segment_and_span
    q, k, v = heads(len(segment), 4, 1)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    whole = attention(q, k, v, plan_attention(segment, span))
    wanted = torch.autograd.grad(whole, (k, v), grad)
    total = [torch.zeros_like(k), torch.zeros_like(v)]
    for rank in range(ranks):
        chunks = torch.arange(len(segment)).tensor_split(2 * ranks)
        query = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))
        out = attention(q[query], k, v, plan_attention(segment, span, query))
        torch.testing.assert_close(out, whole[query], rtol=1e-5, atol=1e-6)
        for sum_of_ranks, part in zip(total, torch.autograd.grad(out, (k, v), grad[query]), strict=True):
            sum_of_ranks += part
    for ours, theirs in zip(total, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("short_or_long")
@settings(max_examples=40, deadline=None)
@given(rows_and_queries())
def test_the_log_sum_exp_and_its_gradient_equal_the_reference(given_row):
    plan = plan_attention(*given_row)
    q, k, v = heads(plan.tokens, 4, 2, queries=plan.queries)
    out, lse = attention_with_lse(q, k, v, plan)
    wanted, wanted_lse = attend_densely(q.double(), k.double(), v.double(), plan)
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=1e-5)
    seeing = wanted_lse.detach().isfinite()
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    ours = (out * grad).sum() + (lse * grad[..., 0])[seeing].sum()
    theirs = (wanted * grad).sum() + (wanted_lse * grad[..., 0])[seeing].sum()
    for our_grad, their_grad in zip(
        torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(theirs, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=2e-5)


def test_parts_over_different_keys_merge_to_the_whole_forward_and_backward():
    """Queries of the last third; parts as a ring of ranks would see them, one of which has no key for some queries."""
    q, k, v = heads(12, 4, 1, queries=4)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    last = torch.arange(8, 12)
    segment, span = torch.tensor([1] * 6 + [2] * 6), torch.zeros(12, dtype=torch.int32)
    wanted = attention(q, k, v, plan_attention(segment, span, last))
    parts = []
    for begin in (0, 4, 8):
        held = segment * ((torch.arange(12) >= begin) & (torch.arange(12) < begin + 4))
        score = torch.einsum("inh,jnh->ijn", q, k.expand(-1, 4, -1)) * 8**-0.5
        seen = (held == segment[last][:, None]) & (torch.arange(12) <= last[:, None])
        score = score.masked_fill(~seen[..., None], -1e30)
        lse = torch.where(seen.any(1)[:, None], score.logsumexp(1), float("-inf"))
        out = torch.einsum("ijn,jnh->inh", score.softmax(1) * seen[..., None], v.expand(-1, 4, -1))
        parts.append((out, lse))
    merged, lse = merge_attention(parts)
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, attention_with_lse(q, k, v, plan_attention(segment, span, last))[1])
    for ours, theirs in zip(
        torch.autograd.grad(merged, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_merging_what_saw_nothing_gives_zeros_and_finite_gradients():
    q = torch.zeros(2, 3, 4, requires_grad=True)
    out, lse = merge_attention([(q * 1, torch.full((2, 3), float("-inf")))] * 2)
    assert (out == 0).all() and (lse == float("-inf")).all()
    out.sum().backward()
    assert q.grad.isfinite().all()
    with pytest.raises(ValueError, match="no parts"):
        merge_attention([])


def test_the_reference_has_the_gradient_of_its_output():
    plan = plan_attention(*row([4, 1, 3], [(1, 3), (5, 8)], 2))
    inputs = [x.detach().requires_grad_() for x in heads(10, 4, 2, width=3, dtype=torch.float64)]
    real = plan.segment_T != 0
    assert torch.autograd.gradcheck(lambda *x: [part[real] for part in attend_densely(*x, plan)], inputs)


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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rotation_within_flex_equals_rotation_before_it():
    plan = plan_attention(*row([6, 4], [(1, 3)], 2))
    cos_sin = rope_cos_sin(torch.arange(12) % 6, 8, 10000.0, torch.float32)
    q, k, v = heads(12, 4, 1)
    with torch.no_grad():
        wanted = attention(apply_rope(q, cos_sin), apply_rope(k, cos_sin), v, plan)
        torch.testing.assert_close(attention(q, k, v, plan, None, cos_sin, backend="flex"), wanted)


def test_another_scale_is_used():
    assert_equals_reference(*row([6, 3], [], 0), scale=0.7)


@pytest.mark.parametrize("attend", [attention, sdpa])
@pytest.mark.parametrize("query", [None, torch.tensor([2, 3, 4, 9, 10])])
def test_rotation_within_attention_equals_rotation_before_it(attend, query):
    segment, span = row([6, 4], [(1, 3)], 2)
    cos_sin = rope_cos_sin(torch.arange(12) % 6, 8, 10000.0, torch.float32)
    plan = plan_attention(segment, span, query)
    inputs, twins = heads(12, 4, 1, queries=plan.queries), heads(12, 4, 1, queries=plan.queries)
    out = attend(*inputs, plan, None, cos_sin)
    own = cos_sin if query is None else CosSin(*(x[query] for x in cos_sin))
    wanted = attention(apply_rope(twins[0], own), apply_rope(twins[1], cos_sin), twins[2], plan)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, twins, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("short_or_long")
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
def test_slots_hold_every_token_once_and_little_padding(segment_and_span):
    plan = plan_attention(*segment_and_span).documents
    real = int((segment_and_span[0] != 0).sum())
    slots = plan.keys
    assert slots.covered == real
    if slots.gather is None:
        return
    assert slots.gather[slots.scatter].tolist() == list(range(real))
    start = 0
    for count in plan.bucket_slots:
        held = ((slots.scatter >= start) & (slots.scatter < start + count)).sum()
        assert count - held <= MAX_WASTE * count
        start += count


def test_causal_documents_and_frames_of_one_size_need_neither_mask_nor_gather():
    causal = plan_attention(*row([9], [], 2)).documents
    assert causal.keys.gather is None and causal.buckets[0].causal and causal.buckets[0].mask is None
    frames = plan_attention(*row([4, 4, 4], [(0, 4), (4, 8), (8, 12)], 0)).documents
    assert frames.keys.gather is None and frames.buckets[0].mask is None and frames.buckets[0].documents == 3
    ragged = plan_attention(*row([20, 19, 18], [], 0)).documents
    assert len(ragged.buckets) == 1 and ragged.buckets[0].mask is None
    sorted_already = plan_attention(*row([64, 32, 16, 16], [], 3)).documents
    assert sorted_already.keys.gather is None and len(sorted_already.buckets) == 3


def test_long_causal_documents_are_computed_in_blocks():
    calls = plan_attention(*row([1024, 1000], [], 0)).cpu_calls
    pairs = sum((call.queries.last - call.queries.first) * call.keys.slots for call in calls)
    assert pairs < 1.2 * (1024**2 + 1000**2) / 2
    assert len(plan_attention(*row([64], [], 0)).cpu_calls) == 1


def test_a_long_document_with_images_is_cut_and_needs_no_mask():
    plan = plan_attention(*row([512, 30], [(100, 356)], 0)).documents
    assert [bucket.mask for bucket in plan.buckets] == [None] and len(plan.runs) == 3
    pairs = sum((run.query_end - run.query) * (run.key_end - run.key) for run in plan.runs)
    assert pairs < 0.8 * 512**2


@pytest.mark.parametrize(
    ("segment", "span", "query", "says"),
    [
        ([1, 0, 2], [0, 0, 0], None, "padding"),
        ([1, 2, 1], [0, 0, 0], None, "document 1 again at position 2"),
        ([1, 1, 2], [0, 5, 5], None, "span 5 on both sides of position 2, where document 1 ends and 2"),
        ([1, 1, 0], [0, 5, 5], None, "document 1 ends and the padding"),
        ([1, 1, 1], [5, 0, 5], None, "span 5 again at position 2"),
        ([1, 1, 1], [0, 0], None, "span_T has 2 tokens and segment_T 3"),
        ([[1, 1]], [0, 0], None, "segment_T has shape"),
        ([1.0, 1.0], [0, 0], None, "segment_T is torch.float32"),
        ([1, 1, 1], [0, 0, 0], [0, 3], "query_Q reaches from 0 to 3"),
        ([1, 1, 1], [0, 0, 0], [-1, 2], "query_Q reaches from -1"),
        ([1, 1, 1], [0, 0, 0], [2, 1], "query_Q has 1 after 2"),
        ([1, 1, 1], [0, 0, 0], [1, 1], "query_Q has 1 after 1"),
    ],
)
def test_a_row_that_cannot_be_is_an_error_that_names_what_is_wrong(segment, span, query, says):
    with pytest.raises(ValueError, match=says):
        plan_attention(torch.tensor(segment), torch.tensor(span), None if query is None else torch.tensor(query))


def test_bfloat16_stays_near_the_reference():
    segment, span = row([6, 5], [(1, 4)], 1)
    q, k, v = (x.detach().bfloat16() for x in heads(12, 4, 1))
    out = attention(q, k, v, plan_attention(segment, span))
    assert out.dtype == torch.bfloat16
    wanted, _ = attend_densely(q.double(), k.double(), v.double(), plan_attention(segment, span))
    torch.testing.assert_close(out.double(), wanted, rtol=0.03, atol=0.03)


def test_the_backend_says_what_it_is_and_why():
    name, reason = attention_backend(torch.device("cpu"))
    assert name == "cpu" and "CPU" in reason

"""A row's tokens attend to memory of their document: equal to a dense float64 reference on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.attention import dispatch
from megatron_gemini.kernels.attention.api import (
    attention,
    attention_with_lse,
    plan_attention,
    plan_cross_attention,
)
from megatron_gemini.kernels.attention.dispatch import AttentionRequest, choose_backend
from megatron_gemini.kernels.attention.reference import attend_densely, visible
from megatron_gemini.kernels.rope import rope_cos_sin
from tests.attention_rows import heads, only_backend, row, rows, rows_and_memory

HEADS = st.sampled_from([(4, 1), (4, 2), (3, 3)])


def memory(*items):
    """segment_M and after_M of (document, place, embeddings)."""
    segment = [document for document, _, size in items for _ in range(size)]
    after = [place for _, place, size in items for _ in range(size)]
    return torch.tensor(segment, dtype=torch.int32), torch.tensor(after, dtype=torch.int64)


def cross_heads(plan, query=4, key=1, **options):
    return heads(plan.keys, query, key, queries=plan.queries, **options)


def assert_same_gradients(ours, theirs, inputs, exact, grad, atol=2e-5):
    for our_grad, their_grad in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, exact, grad.double()), strict=True
    ):
        torch.testing.assert_close(our_grad, their_grad.float(), rtol=1e-5, atol=atol)


def assert_equals_reference(plan, counts=(4, 1), backend=None, scale=None):
    inputs = cross_heads(plan, *counts)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, (wanted, _) = attention(*inputs, plan, scale, backend=backend), attend_densely(*exact, plan, scale)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    assert_same_gradients(
        out, wanted, inputs, exact, torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    )


@settings(max_examples=60)
@given(rows_and_memory())
def test_a_token_sees_the_memory_of_its_document_that_comes_before_it(arguments):
    segment, segment_m, after, query = arguments
    plan, position = plan_cross_attention(*arguments), range(len(segment)) if query is None else query.tolist()
    wanted = [[s == segment[i] != 0 and a <= i for s, a in zip(segment_m, after, strict=True)] for i in position]
    assert visible(plan).tolist() == wanted
    assert plan.empty == (not any(map(any, wanted)))


@settings(max_examples=100)
@given(rows_and_memory())
def test_the_intervals_say_what_each_query_sees_and_what_sees_each_memory(arguments):
    plan = plan_cross_attention(*arguments)
    key, query = torch.arange(plan.keys), torch.arange(plan.queries)
    start, reach = plan.bounds.query_2Q[..., None]
    first, last = plan.bounds.key_2T
    assert torch.equal((key >= start) & (key < reach), visible(plan))
    assert torch.equal((query[:, None] >= first) & (query[:, None] < last), visible(plan))
    nothing = ~visible(plan).any(1)
    assert (start[nothing] == plan.keys).all() and (reach[nothing] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@settings(max_examples=60)
@given(rows_and_memory(), HEADS)
def test_any_row_and_memory_equal_the_dense_reference_forward_and_backward(backend, arguments, counts):
    assert_equals_reference(plan_cross_attention(*arguments), counts, backend)


@settings(max_examples=40)
@given(rows_and_memory(), HEADS)
def test_the_log_sum_exp_and_its_gradient_equal_the_reference(arguments, counts):
    plan = plan_cross_attention(*arguments)
    inputs = cross_heads(plan, *counts)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (out, lse), (wanted, wanted_lse) = attention_with_lse(*inputs, plan), attend_densely(*exact, plan)
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=1e-5)
    seeing = wanted_lse.detach().isfinite()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        (o * grad.to(o.dtype)).sum() + (x * grad[..., 0])[seeing].sum() for o, x in ((out, lse), (wanted, wanted_lse))
    )
    assert_same_gradients(ours, theirs, inputs, exact, torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15)
@given(rows_and_memory(longest=6, documents=3), HEADS)
def test_flex_equals_the_reference_forward(arguments, counts):
    """It has no backward on the CPU; tests/gpu/test_attention.py has it."""
    plan = plan_cross_attention(*arguments)
    inputs = cross_heads(plan, *counts)
    with torch.no_grad():
        out, lse = attention_with_lse(*inputs, plan, backend="flex")
        wanted, wanted_lse = attend_densely(*(x.double() for x in inputs), plan)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "sdpa"])  # flex: above; triton: interpreted_attention.py
def test_a_backend_that_is_named_runs_and_no_other_does(monkeypatch, name):
    only_backend(monkeypatch, name)
    plan = plan_cross_attention(row([5, 4], [], 1)[0], *memory((1, 2, 3), (2, 0, 2)), torch.tensor([1, 3, 4, 8]))
    assert_equals_reference(plan, backend=name)


@pytest.mark.parametrize(
    ("items", "padding"),
    [
        ([], 0),
        ([], 3),
        ([(1, 0, 3)], 0),
        ([(2, 6, 3)], 2),
        ([(1, 6, 3)], 0),  # behind its document's last token
        ([(2, 10, 3)], 2),  # behind the last token of all
        ([(1, 1, 2), (1, 3, 2), (1, 6, 2), (2, 0, 1), (2, 9, 4)], 1),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_edge_memory_equals_the_reference(backend, items, padding):
    assert_equals_reference(plan_cross_attention(row([6, 4], [], padding)[0], *memory(*items)), (4, 2), backend)


def test_another_scale_is_used():
    assert_equals_reference(plan_cross_attention(row([6], [], 0)[0], *memory((1, 2, 4))), scale=0.7)


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_what_sees_nothing_and_what_nothing_sees_is_zero_and_has_no_gradient(backend):
    """Tokens before the item, of a document without memory, and padding; memory without later tokens, and padding."""
    segment, _ = row([4, 3, 2], [], 2)
    segment_m, after = memory((1, 2, 3), (1, 4, 2), (3, 7, 1), (0, 0, 2))
    plan = plan_cross_attention(segment, segment_m, after)
    q, k, v = cross_heads(plan)
    out = attention(q, k, v, plan, backend=backend)
    q_grad, k_grad, v_grad = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    blind = [0, 1, 4, 5, 6, 9, 10]
    assert (out[blind] == 0).all() and (q_grad[blind] == 0).all()
    assert (out[[2, 3, 7, 8]] != 0).all()
    for grad in (k_grad, v_grad):
        assert (grad[[3, 4, 6, 7]] == 0).all()
    assert (v_grad[[0, 1, 2, 5]] != 0).all()


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@settings(max_examples=30)
@given(rows(longest=9, documents=4))
def test_a_row_as_its_own_memory_is_causal_attention(backend, segment_and_span):
    """Token j as memory from position j on."""
    segment, _ = segment_and_span
    inputs = heads(len(segment), 4, 2)
    plan = plan_cross_attention(segment, segment, torch.arange(len(segment)))
    out, wanted = (
        attention(*inputs, p, backend=backend) for p in (plan, plan_attention(segment, torch.zeros_like(segment)))
    )
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(rows_and_memory(), st.integers(1, 4))
def test_ranks_that_divide_the_queries_have_the_rows_output_and_their_memory_gradients_sum_to_its(arguments, ranks):
    *arguments, _ = arguments
    whole = plan_cross_attention(*arguments)
    q, k, v = cross_heads(whole)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = attention(q, k, v, whole)
    total = [torch.zeros_like(k), torch.zeros_like(v)]
    for rank in range(ranks):
        chunks = torch.arange(len(q)).tensor_split(2 * ranks)
        query = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))
        part = attention(q[query], k, v, plan_cross_attention(*arguments, query))
        torch.testing.assert_close(part, out[query], rtol=1e-5, atol=1e-6)
        for sum_of_ranks, partial in zip(total, torch.autograd.grad(part, (k, v), grad[query]), strict=True):
            sum_of_ranks += partial
    for ours, theirs in zip(total, torch.autograd.grad(out, (k, v), grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [0, 1, 2])
def test_a_nan_in_one_documents_memory_reaches_no_other(poison):
    segment, _ = row([6, 3, 7], [], 2)
    segment_m, after = memory((1, 0, 3), (2, 7, 2), (3, 10, 4), (3, 12, 1))
    bad, bad_memory = segment == poison + 1, segment_m == poison + 1
    plan = plan_cross_attention(segment, segment_m, after)
    q, k, v = cross_heads(plan)
    with torch.no_grad():
        k[bad_memory], v[bad_memory] = torch.nan, torch.nan
    out = attention(q, k, v, plan)
    assert out[~bad].isfinite().all()
    q_grad, k_grad, v_grad = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert (
        q_grad[~bad].isfinite().all() and k_grad[~bad_memory].isfinite().all() and v_grad[~bad_memory].isfinite().all()
    )


def test_documents_may_come_in_another_order_in_the_row_than_in_the_memory():
    segment = torch.tensor([7, 7, 7, 2, 2, 0])
    assert_equals_reference(plan_cross_attention(segment, *memory((2, 4, 2), (7, 1, 3))))


def test_bfloat16_stays_near_the_reference():
    plan = plan_cross_attention(row([6, 5], [], 1)[0], *memory((1, 2, 9), (2, 6, 7)))
    inputs = [x.detach().bfloat16() for x in cross_heads(plan)]
    out = attention(*inputs, plan)
    assert out.dtype == torch.bfloat16
    wanted, _ = attend_densely(*(x.double() for x in inputs), plan)
    torch.testing.assert_close(out.double(), wanted, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("segment", "after", "says"),
    [
        ([1, 0, 2], [0, 0, 0], "segment_M has padding"),
        ([2, 1], [0, 0], "segment_M has document 1 after 2; sort"),
        ([1, 2, 1, 2], [0, 0, 0, 0], "segment_M has document 1 after 2; sort"),
        ([1, 3], [0, 0], "segment_M has document 3, which segment_T lacks"),
        ([1, 1], [0], "after_M has 1 numbers and segment_M 2"),
        ([1, 1], [2, 1], "after_M has 1 after 2 in document 1; sort"),
        ([1, 2], [0, 7], "after_M reaches from 0 to 7; .* from 0 to its length 6"),
        ([1, 2], [-1, 3], "after_M reaches from -1 to 3"),
        ([[1]], [0], r"segment_M has shape \[1, 1\]; .* of shape \[M\]"),
        ([1], [0.0], "after_M is torch.float32"),
    ],
)
def test_a_memory_that_cannot_be_is_an_error_that_names_what_is_wrong(segment, after, says):
    with pytest.raises(ValueError, match=says):
        plan_cross_attention(torch.tensor([1, 1, 1, 2, 2, 0]), torch.tensor(segment), torch.tensor(after))


def test_memory_on_another_device_is_an_error():
    segment_m, after = memory((1, 0, 2))
    with pytest.raises(ValueError, match="segment_M is on meta and segment_T on cpu"):
        plan_cross_attention(torch.tensor([1, 1]), segment_m.to("meta"), after)


def test_keys_that_are_not_the_memorys_are_an_error_that_gives_both_numbers():
    plan = plan_cross_attention(row([6], [], 0)[0], *memory((1, 2, 4)))
    q, k, v = heads(6, 4, 1)
    with pytest.raises(ValueError, match=r"a plan of 4 keys both are \[4, K, 8\]"):
        attention(q, k, v, plan)
    with pytest.raises(ValueError, match="q_QNH has 4 queries and the plan 6"):
        attention(*heads(4, 4, 1), plan)


def test_rotating_memory_is_an_error():
    plan = plan_cross_attention(row([4], [], 0)[0], *memory((1, 2, 4)))
    inputs, cos_sin = cross_heads(plan), rope_cos_sin(torch.arange(4), 8, 1e4, torch.float32)
    for attend in (attention, attention_with_lse):
        with pytest.raises(ValueError, match=r"cos_sin .* memory has none in the row; pass None"):
            attend(*inputs, plan, cos_sin=cos_sin)


def test_flash_attn_is_not_called_and_says_why(monkeypatch):
    monkeypatch.setattr(dispatch, "installed_flash_attention", lambda: (3, None))
    monkeypatch.setattr(dispatch, "card_runs_triton", lambda _: "")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: True)
    request = AttentionRequest(torch.device("cuda"), torch.bfloat16, 128, True, False, cross=True)
    assert choose_backend(request).name == "triton"
    for name in ("flash-attn", "flash-attn-2"):
        with pytest.raises(ValueError, match="the keys are not the row's"):
            choose_backend(request, name)

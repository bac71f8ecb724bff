"""Our attention kernels and every other backend on a card, at real sizes, against a float64 reference.

pytest -m gpu tests/gpu/test_attention.py
"""

from __future__ import annotations

import pytest
import torch

from megatron_gemini.kernels.attention.api import attention, attention_with_lse, plan_attention, plan_cross_attention
from megatron_gemini.kernels.attention.dispatch import BACKENDS, AttentionRequest
from megatron_gemini.kernels.attention.reference import attend_densely
from tests.attention_rows import heads, only_backend, row

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the norm
ROWS = {
    "one token": ([1], [], 0),
    "causal": ([4096], [], 0),
    "not a multiple of the tile": ([1000, 1, 333, 700], [], 61),
    "images": ([2000, 500, 1500], [(100, 356), (356, 612), (1990, 2000), (2000, 2500), (3700, 4000)], 96),
    "short documents": ([32] * 64, [(32 * i, 32 * i + 16) for i in range(64)], 0),
    "padding": ([], [], 300),
}


def on_card(plan_arguments, query=None):
    segment, span = row(*plan_arguments)
    return plan_attention(segment.cuda(), span.cuda(), None if query is None else query.cuda())


def inputs_of(plan, counts, width, dtype):
    made = heads(plan.keys, *counts, width, queries=plan.queries, dtype=dtype)
    return [x.detach().cuda().requires_grad_() for x in made]


def assert_equals_reference(plan, counts, width, dtype, backend):
    """By head groups, so that the reference's float64 scores fit the card."""
    inputs = inputs_of(plan, counts, width, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(inputs[0].shape, device="cuda").to(dtype)
    out = attention(*inputs, plan, backend=backend)
    wanted, _ = attend_densely(*exact, plan)
    grads, wanted_grads = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, exact, grad.double())
    for ours, theirs in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - theirs).norm() <= ROUNDING[dtype] * max(theirs.norm(), 1e-3)


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("counts", [(8, 1), (6, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_our_kernels_equal_the_reference(name, counts, dtype, width):
    assert_equals_reference(on_card(ROWS[name]), counts, width, dtype, "triton")


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.name != "cpu"])
def test_a_backend_that_is_named_runs_and_no_other_does(monkeypatch, backend):
    only_backend(monkeypatch, backend)
    plan = on_card(ROWS["causal"])
    ask = AttentionRequest(torch.device("cuda"), torch.bfloat16, 128, plan.sequences is not None, False)
    reason = next(b for b in BACKENDS if b.name == backend).unable(ask)
    if reason:
        pytest.skip(reason)
    assert_equals_reference(plan, (8, 1), 128, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
def test_some_of_the_queries_and_the_rows_images(backend):
    query = torch.cat((torch.arange(512, 1024), torch.arange(3072, 3584)))
    assert_equals_reference(on_card(ROWS["images"], query), (8, 1), 128, torch.bfloat16, backend)


@pytest.mark.parametrize("counts", [(8, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
@pytest.mark.parametrize("query", [None, torch.arange(700, 1500)], ids=["row", "some queries"])
def test_memory_equals_the_reference(query, backend, counts):
    """Documents with items at their start and within them, without memory, and with an item behind the last token."""
    segment, _ = row([1000, 300, 700], [], 48)
    segment_m = torch.tensor([1] * 512 + [3] * 400 + [0] * 11)
    after_m = torch.tensor([0] * 256 + [640] * 256 + [1300] * 200 + [1777] * 100 + [2000] * 100 + [0] * 11)
    plan = plan_cross_attention(*(None if x is None else x.cuda() for x in (segment, segment_m, after_m, query)))
    assert_equals_reference(plan, counts, 128, torch.bfloat16, backend)


def test_the_log_sum_exp_equals_the_reference():
    plan = on_card(ROWS["images"])
    inputs = inputs_of(plan, (8, 1), 128, torch.bfloat16)
    _, lse = attention_with_lse(*inputs, plan, backend="triton")
    _, wanted = attend_densely(*(x.detach().double() for x in inputs), plan)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_backward_gives_the_same_bits_every_time():
    plan = on_card(ROWS["images"])
    inputs = inputs_of(plan, (16, 1), 128, torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    results = [torch.autograd.grad(attention(*inputs, plan, backend="triton"), inputs, grad) for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_row_of_128k_tokens_runs_and_its_last_tokens_are_right():
    """The reference of the last 64 queries alone fits the card."""
    plan = on_card(([131072], [], 0))
    inputs = inputs_of(plan, (8, 1), 128, torch.bfloat16)
    out = attention(*inputs, plan, backend="triton")
    some = plan_attention(plan.segment_T, plan.span_T, torch.arange(131008, 131072, device="cuda"))
    q, k, v = (x.detach().double() for x in inputs)
    wanted, _ = attend_densely(q[-64:], k, v, some)
    error = (out[-64:].double() - wanted).norm()
    assert error <= ROUNDING[torch.bfloat16] * wanted.norm()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))

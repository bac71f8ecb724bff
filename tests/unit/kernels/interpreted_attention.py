"""Our Triton attention under Triton's interpreter, on CPU tensors.

`test_attention_triton.py` starts it with TRITON_INTERPRET=1, which has to be set before Triton is imported.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from megatron_gemini.kernels.attention.api import attention, attention_with_lse, plan_attention, plan_cross_attention
from megatron_gemini.kernels.attention.reference import attend_densely
from megatron_gemini.kernels.attention.triton import tiling
from megatron_gemini.kernels.attention.triton.operators import flash_attention, flash_attention_backward
from megatron_gemini.kernels.attention.triton.tiling import Tiling, Tilings
from tests.attention_rows import heads, only_backend, row, rows_and_memory, rows_and_queries
from tools.bench import attention as bench

SMALL = Tilings(Tiling(32, 16, 4, 1), Tiling(16, 32, 4, 1), Tiling(32, 16, 4, 1))
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # of the norm; measured ones are half


@pytest.fixture(autouse=True)
def poison():
    """Memory that a kernel should have written and did not is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short rows have empty, full and partial ones."""
    monkeypatch.setattr(tiling, "TILINGS", {table: {64: SMALL} for table in tiling.TILINGS})


def gradients(attend, inputs, plan, seeing, seed=1):
    """(out, lse, gradients) of a loss that weighs both."""
    out, lse = attend(*inputs, plan)
    generator = torch.Generator().manual_seed(seed)
    out_weight = torch.randn(out.shape, generator=generator)
    lse_weight = torch.randn(lse.shape, generator=generator)
    loss = (out * out_weight.to(out.dtype)).sum() + (lse * lse_weight)[seeing].sum()
    return out, lse, torch.autograd.grad(loss, inputs)


def by_triton(*inputs):
    return attention_with_lse(*inputs, backend="triton")


def assert_equals_reference(plan, query, key, width, dtype=torch.float32, seed=0):
    inputs = [x.detach().requires_grad_() for x in heads(plan.keys, query, key, width, seed, plan.queries, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    seeing = attend_densely(*exact, plan)[1].isfinite()
    wanted, wanted_lse, wanted_grads = gradients(attend_densely, exact, plan, seeing)
    out, lse, grads = gradients(by_triton, inputs, plan, seeing)
    assert (out[~seeing] == 0).all() and (lse[~seeing] == float("-inf")).all()
    torch.testing.assert_close(lse[seeing].double(), wanted_lse[seeing], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((out, *grads), (wanted, *wanted_grads), strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        error = (ours.double() - theirs).norm()
        assert error <= ROUNDING[dtype] * max(theirs.norm(), 1e-3), f"{error / theirs.norm():.2e}"


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows_and_queries(longest=20, documents=3), st.sampled_from([(4, 1), (6, 2), (2, 2)]), st.integers(0, 1000))
def test_any_row_and_any_part_of_its_queries_equals_the_reference(given_row, counts, seed):
    assert_equals_reference(plan_attention(*given_row), *counts, 16, seed=seed)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows_and_memory(longest=20, documents=3), st.sampled_from([(4, 1), (4, 2), (3, 3)]), st.integers(0, 1000))
def test_any_row_and_memory_equal_the_reference(arguments, counts, seed):
    assert_equals_reference(plan_cross_attention(*arguments), *counts, 16, seed=seed)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("query", [None, torch.cat((torch.arange(10, 40), torch.arange(85, 93)))])
def test_more_memory_than_a_block_and_more_queries_than_a_tile_equal_the_reference(query):
    """Documents of which one has no memory, one sees all of it, and one sees more of it thrice."""
    segment, _ = row([50, 8, 35], [], 3)
    segment_m = torch.tensor([1] * 70 + [3] * 41 + [0] * 5)
    after = torch.tensor([0] * 70 + [60] * 10 + [75] * 20 + [93] * 11 + [0] * 5)
    assert_equals_reference(plan_cross_attention(segment, segment_m, after, query), 8, 2, 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_documents_with_images_equal_the_reference_in_half_precision(dtype):
    plan = plan_attention(*row([60, 1, 30], [(3, 25), (25, 33), (61, 91)], 3))
    assert_equals_reference(plan, 4, 1, 32, dtype)


@pytest.mark.parametrize(
    ("width", "dtype", "query", "key"),
    [
        (64, torch.float16, 4, 1),
        (80, torch.bfloat16, 4, 2),
        (96, torch.float32, 3, 3),
        (128, torch.bfloat16, 16, 1),
        (256, torch.bfloat16, 6, 1),
        (256, torch.float32, 2, 1),
    ],
)
def test_every_head_width_with_the_blocks_of_the_table(width, dtype, query, key):
    assert_equals_reference(plan_attention(*row([30, 9], [(4, 12)], 2)), query, key, width, dtype)


@pytest.mark.long
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("descriptors", [False, True])
def test_blocks_by_pointer_and_by_descriptor_equal_the_reference(monkeypatch, descriptors):
    monkeypatch.setattr(tiling, "takes_descriptors", lambda *_: descriptors)
    assert_equals_reference(plan_attention(*row([40, 13], [(5, 30)], 2)), 8, 1, 16)


@pytest.mark.long
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("splits", [2, 4])
def test_heads_split_into_groups_sum_to_the_reference(monkeypatch, splits):
    monkeypatch.setattr("megatron_gemini.kernels.attention.triton.operators.split_heads", lambda *_: splits)
    assert_equals_reference(plan_attention(*row([40, 13], [(5, 30)], 2)), 8, 2, 16)


def test_heads_are_split_until_the_chip_is_full_and_no_further(monkeypatch):
    monkeypatch.setattr(tiling, "multiprocessors", lambda _: 132)
    split = tiling.split_heads
    assert [split(p, 16, torch.device("cpu")) for p in (200, 132, 64, 8, 1)] == [1, 1, 4, 8, 8]
    assert split(8, 1, torch.device("cpu")) == 1 and split(8, 6, torch.device("cpu")) == 2


@pytest.mark.long
@pytest.mark.usefixtures("small_blocks")
def test_the_backward_gives_the_same_bits_twice():
    plan = plan_attention(*row([40, 13], [(5, 30)], 2))
    results = []
    for _ in range(2):
        inputs = heads(plan.tokens, 8, 1, 16, dtype=torch.bfloat16)
        results.append(gradients(by_triton, [x.detach().requires_grad_() for x in inputs], plan, slice(0, 53))[2])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("small_blocks")
def test_strided_inputs_are_read_where_they_lie():
    """Queries, keys and values as slices of one product, and with the width not innermost."""
    plan = plan_attention(*row([20], [], 1))
    both = torch.randn(21, 6, 16)
    q, k, v = both[:, :4], both[:, 4:5], both[:, 5:]
    wanted, _ = attend_densely(*(x.double() for x in (q, k, v)), plan)
    torch.testing.assert_close(by_triton(q, k, v, plan)[0], wanted.float(), rtol=1e-5, atol=1e-5)
    rotated = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(by_triton(rotated, k, v, plan)[0], wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("small_blocks")
def test_the_operators_keep_torch_librarys_rules():
    plan = plan_attention(*row([20, 3], [(2, 9)], 1))
    inputs = [x.detach().requires_grad_() for x in heads(24, 4, 1, 16)]
    bounds = plan.bounds
    orders = [bounds.order("query", 4, 32), bounds.order("query", 4, 16), bounds.order("key", 1, 16)]
    torch.library.opcheck(flash_attention, (*inputs, bounds.query_2Q, bounds.key_2T, *orders, 0.25))
    with torch.no_grad():
        results = flash_attention(*inputs, bounds.query_2Q, bounds.key_2T, *orders, 0.25)
        tensors = (*results, *inputs, *results, bounds.query_2Q, bounds.key_2T, *orders[1:])
        detached = [x.detach() for x in tensors]
        detached[1] = torch.zeros_like(results[1])  # the gradient of a log-sum-exp that may be -inf
        torch.library.opcheck(flash_attention_backward, (*detached, 0.25))


@pytest.mark.long
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("way", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed_it_gives_the_same(way):
    plan = plan_attention(*row([20, 3], [(2, 9)], 1))
    assert plan.bounds is not None  # made once a microbatch, before the layers

    def attend(q, k, v):
        return attention(q * 1.5, k, v, plan, backend="triton").square()

    inputs, twins = ([x.detach().requires_grad_() for x in heads(24, 4, 1, 16)] for _ in range(2))
    if way == "compiled":
        out = torch.compile(attend, backend="aot_eager")(*inputs)
    else:
        out = checkpoint(attend, *inputs, use_reentrant=False)
    wanted = attend(*twins)
    torch.testing.assert_close(out, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(wanted.sum(), twins), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_blocks")
def test_named_it_runs_and_no_other_backend_does(monkeypatch):
    only_backend(monkeypatch, "triton")
    inputs, plan = heads(4, 2, 1, 16), plan_attention(*row([4], [], 0))
    torch.testing.assert_close(attention(*inputs, plan, backend="triton"), attend_densely(*inputs, plan)[0])


@pytest.mark.long
def test_what_the_benchmark_runs_on_a_card_runs_here_and_counts_the_pairs_that_are_seen(capsys):
    """Without a card: our kernels and SDPA with a mask; what cannot run says so."""
    size = ("cpu", torch.bfloat16, 32, (64,))
    found = list(bench.compare_on_card(*size, heads=(2,), rounds=1))
    assert {(r["case"].split(",")[0], r["candidate"]) for r in found} >= {
        ("causal", "triton"),
        ("mixed", "triton"),
        ("mixed", "SDPA, dense mask"),
    }
    assert "unable" in capsys.readouterr().out
    tuned = list(bench.tune(*size, heads=2, sizes=[(32, 32, 4, 2)]))
    assert [r["kernel"] for r in tuned] == ["forward", "query_gradient", "key_gradient"]
    assert bench.pairs_seen(bench.Row((4, 2)).plan("cpu")) == 10 + 3
    assert int(bench.dense_mask(bench.Row((8,), 2, 4).plan("cpu")).sum()) == 36 + 2

"""A branch whose values nobody reads saves what it always does and leaves out its last product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.kernels.discarded_output import discard_output, discarded_output, output_is_discarded
from megatron_gemini.kernels.rope import rope_cos_sin
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.tensor.attention_input import norm_query_key_value
from megatron_gemini.parallel.tensor.attention_output import attention_output
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.tensor.products import gated_mlp, project_add
from tests.unit.parallel.test_tensor_products import Ranks

T, D, F, N, H = 6, 8, 12, 2, 4
Branch = Callable[..., torch.Tensor]
ONE, TENSOR, SEQUENCE = TensorRanks(), Ranks(1, sequence=False), Ranks(2, sequence=True)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attend(segment: list[int], ranks: Ranks | TensorRanks) -> Branch:
    """The end of the attention of a row of these documents, of all its tokens."""
    plan = plan_attention(torch.tensor(segment), torch.zeros(len(segment), dtype=torch.int32))
    cos_sin = rope_cos_sin(torch.arange(len(segment)), H, 1e4, torch.float32)
    return lambda q, k, v, weight, h: attention_output(q, k, v, plan, cos_sin, weight, h, ranks)


def mlp(activation: str, ranks: Ranks | TensorRanks) -> Branch:
    return lambda h, norm, w, down: gated_mlp(h, norm, 1e-6, w, down, activation, ranks)


def product(ranks: Ranks | TensorRanks) -> Branch:
    return lambda x, w, h: project_add(x, w, h, ranks)


ROW, PADDING = [1, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0]
MLP = [(T, D), (D,), (2, F, D), (D, F)]
HEADS = [(T, N, H), (T, 1, H), (T, 1, H), (D, N * H), (T, D)]
WHOLE_HEADS = [(2 * T, N, H), (2 * T, 1, H), (2 * T, 1, H), (D, N * H), (T, D)]
BRANCHES: dict[str, tuple[Branch, list[tuple[int, ...]]]] = {
    "mlp": (mlp("gelu", ONE), MLP),
    "product": (product(ONE), [(T, N, H), (D, N * H), (T, D)]),
    "attention": (attend(ROW, ONE), HEADS),
    "attention of padding": (attend(PADDING, ONE), HEADS),
    "mlp of tensor ranks": (mlp("gelu", TENSOR), MLP),
    "attention of tensor ranks": (attend(ROW, TENSOR), HEADS),
    "mlp of sequence ranks": (mlp("silu", SEQUENCE), MLP),
    "product of sequence ranks": (product(SEQUENCE), [(2 * T, N, H), (D, N * H), (T, D)]),
    "attention of sequence ranks": (attend([*ROW[:5], *[3] * 6, 0], SEQUENCE), WHOLE_HEADS),
}


@pytest.mark.parametrize(("branch", "shapes"), BRANCHES.values(), ids=BRANCHES)
def test_gradients_are_the_same_bits_and_no_values_are_computed(branch: Branch, shapes: list) -> None:
    inputs = tensors(*shapes)
    grad = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    read = branch(*inputs)
    with discard_output():
        out = branch(*inputs)
    assert out.shape == read.shape and out.dtype == read.dtype
    assert out.untyped_storage().nbytes() == out.element_size() < read.untyped_storage().nbytes()
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(read, inputs, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("branch", [name for name in BRANCHES if name.endswith("ranks")])
def test_what_is_unread_is_not_summed_over_ranks(branch: str) -> None:
    function, shapes = BRANCHES[branch]
    inputs, ranks = tensors(*shapes), TENSOR if "tensor" in branch else SEQUENCE
    ranks.sent.clear()
    function(*inputs)
    assert "reduce" in dict(ranks.sent)
    ranks.sent.clear()
    with discard_output():
        function(*inputs)
    assert "reduce" not in dict(ranks.sent)


def test_what_begins_a_branch_is_computed_all_the_same() -> None:
    h, norm, query, key_value = tensors((T, D), (D,), (N * H, D), (2, H, D))
    arguments = (h, norm, 1e-6, query, key_value, HeadShard(N, 1, 0, whole=True), SEQUENCE)
    with discard_output():
        found = norm_query_key_value(*arguments)
    for a, b in zip(found, norm_query_key_value(*arguments), strict=True):
        assert torch.equal(a, b)


def test_values_are_read_again_afterwards_also_after_an_error() -> None:
    with discard_output():
        assert output_is_discarded()
    assert not output_is_discarded()
    with pytest.raises(ZeroDivisionError), discard_output():
        _ = 1 / 0
    assert not output_is_discarded()


def test_no_values_have_the_shape_and_memory_for_one() -> None:
    like = torch.ones(3, 5, dtype=torch.bfloat16)
    stand_in = discarded_output(like)
    assert (stand_in.shape, stand_in.dtype, stand_in.untyped_storage().nbytes()) == (like.shape, like.dtype, 2)

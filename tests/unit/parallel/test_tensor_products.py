"""The layers' nodes as one rank sees them, alone or among others: what they compute, keep, send.

Several ranks: tests/distributed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_gemini.kernels.attention.api import attention, plan_attention
from megatron_gemini.kernels.rope import rope_cos_sin
from megatron_gemini.parallel.collectives import Pending, TensorRanks, gather_stream
from megatron_gemini.parallel.tensor.attention_input import norm_query_key_value
from megatron_gemini.parallel.tensor.attention_output import attention_output
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.tensor.products import gated_mlp, project_add
from megatron_gemini.parallel.tensor.vocabulary import embed_stream
from tests.attention_rows import heads, row

EPS, H = 1e-3, 4  # eps large enough that forgetting it fails


class Ranks:
    """Stands for several tensor-parallel ranks, of which `copies` hold the same tensors; counts what is sent."""

    def __init__(self, copies: int, sequence: bool) -> None:
        self.size, self.copies, self.sequence, self.sent = max(2, copies), copies, sequence, []

    def gather(self, x):
        if not self.sequence:
            return Pending(x)
        self.sent.append(("gather", x.numel() * self.copies))
        return Pending(x.repeat(self.copies, *[1] * (x.dim() - 1)))

    def reduce(self, x):
        self.sent.append(("reduce", x.numel()))
        return Pending(x.view(self.copies, -1, *x.shape[1:]).sum(0) if self.sequence else x)


each_layout = pytest.mark.parametrize(
    "ranks", [TensorRanks(), Ranks(1, False), Ranks(1, True)], ids=["one", "tensor", "sequence"]
)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def norm64(x, weight):
    return F.rms_norm(x, x.shape[-1:], None, EPS) * (1 + weight)


def assert_same(ours, theirs, inputs):
    """`ours(*inputs)` in float32 equals `theirs(*inputs)` in float64, and so do all gradients."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    outs, wanteds = (x if isinstance(x, tuple) else (x,) for x in (ours(*inputs), theirs(*doubles)))
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(x.shape, generator=generator) for x in outs]
    for a, b in zip(outs, wanteds, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=3e-5)
    found = torch.autograd.grad(outs, inputs, grads)
    for a, b in zip(found, torch.autograd.grad(wanteds, doubles, [g.double() for g in grads]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=3e-5)


@each_layout
@pytest.mark.parametrize(("held", "first", "read"), [(1, 0, 1), (3, 1, 1), (4, 2, 2), (2, 0, 2)])
def test_queries_keys_and_values_equal_torch(held, first, read, ranks):
    shard = HeadShard(2, read, first, whole=True)

    def theirs(h, norm, query, key_value):
        n = norm64(h, norm)
        key, value = ((n @ w.T).unflatten(1, (-1, H))[:, first : first + read] for w in key_value)
        return (n @ query.T).unflatten(1, (-1, H)), key, value

    assert_same(
        lambda h, norm, query, key_value: norm_query_key_value(h, norm, EPS, query, key_value, shard, ranks),
        theirs,
        tensors((6, 8), (8,), (2 * H, 8), (2, held * H, 8)),
    )


@each_layout
def test_queries_keys_and_values_of_heads_that_no_other_rank_holds_equal_torch(ranks):
    def theirs(h, norm, query, key_value):
        n = norm64(h, norm)
        return tuple((n @ w.T).unflatten(1, (-1, H)) for w in (query, *key_value))

    assert_same(
        lambda h, norm, query, key_value: norm_query_key_value(h, norm, EPS, query, key_value, HeadShard(3, 2), ranks),
        theirs,
        tensors((6, 8), (8,), (3 * H, 8), (2, 2 * H, 8)),
    )


@each_layout
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_mlp_equals_torch(activation, ranks):
    act = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")

    def theirs(h, norm, gate_up, down):
        n = norm64(h, norm)
        return h + (act(n @ gate_up[0].T) * (n @ gate_up[1].T)) @ down.T

    assert_same(
        lambda h, norm, gate_up, down: gated_mlp(h, norm, EPS, gate_up, down, activation, ranks),
        theirs,
        tensors((6, 8), (8,), (2, 10, 8), (8, 10)),
    )


@each_layout
@pytest.mark.parametrize("shape", [(6, 8), (6, 2, H)])
def test_the_projection_equals_torch(shape, ranks):
    inputs = tensors(shape, (5, 8), (6, 5))
    assert_same(lambda x, w, r: project_add(x, w, r, ranks), lambda x, w, r: r + x.flatten(1) @ w.T, inputs)


@each_layout
@pytest.mark.parametrize("lengths", [[12], [5, 4], []], ids=["one document", "two and padding", "padding"])
def test_the_attention_output_equals_attention_then_product_then_sum(lengths, ranks):
    segment, span = row(lengths, [], 12 - sum(lengths))
    cos_sin = rope_cos_sin(torch.arange(12), 8, 10000.0, torch.float32)
    plan = plan_attention(segment, span)
    weight, residual = torch.randn(16, 32, requires_grad=True), torch.randn(12, 16, requires_grad=True)
    inputs = [*heads(12, 4, 1), weight, residual]
    out = attention_output(*inputs[:3], plan, cos_sin, weight, residual, ranks)
    wanted = residual + attention(*inputs[:3], plan, cos_sin=cos_sin).flatten(1) @ weight.T
    grad = torch.randn(out.shape)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@each_layout
def test_the_attention_output_is_one_node_on_a_cpu(ranks):
    """On small rows nodes are most of what a layer costs (tools/bench/step.py)."""
    inputs = heads(12, 4, 1)
    weight, residual = torch.randn(16, 32), torch.randn(12, 16)
    cos_sin = rope_cos_sin(torch.arange(12), 8, 10000.0, torch.float32)
    out = attention_output(*inputs, plan_attention(*row([12], [], 0)), cos_sin, weight, residual, ranks)
    before = {node for node, _ in out.grad_fn.next_functions if node is not None}
    assert before == {torch.autograd.graph.get_gradient_edge(x).node for x in inputs}


def test_one_rank_embeds_ids_of_any_shape_and_refuses_those_that_it_has_no_row_for():
    for token in (torch.tensor([4, 0, 4, 1]), torch.tensor([[4, 0], [2, 1]])):
        assert_same(
            lambda weight, token=token: embed_stream(token, weight, 0, TensorRanks()),
            lambda weight, token=token: F.embedding(token, weight),
            tensors((5, 4)),
        )
    with pytest.raises(IndexError):
        embed_stream(torch.tensor([5]), tensors((5, 4))[0], 0, TensorRanks())


@pytest.mark.parametrize("sequence", [False, True])
def test_the_embedding_of_one_of_several_ranks_is_zero_for_the_ids_of_others(sequence):
    token = torch.tensor([7, 3, 4, 9, 4, 0])  # this rank holds the ids 3 to 7

    def theirs(weight):
        return F.embedding((token - 3).clamp(0, 4), weight) * ((token >= 3) & (token < 8)).unsqueeze(1)

    assert_same(lambda weight: embed_stream(token, weight, 3, Ranks(1, sequence)), theirs, tensors((5, 4)))


def test_one_rank_sends_nothing_and_gets_back_the_very_tensors():
    ranks, x = TensorRanks(), tensors((6, 8))[0]
    for pending in (ranks.gather(x), ranks.reduce(x)):
        assert pending.work is None and pending.wait() is x
    assert gather_stream(x, ranks) is x


@pytest.mark.parametrize("sequence", [False, True])
def test_the_gradient_of_the_gathered_stream_is_reduced_and_that_of_others_is_not_touched(sequence):
    """Without sequence parallelism the sum is made in place, so it must not be made in a gradient that others read."""
    ranks, x = Ranks(2, sequence), tensors((6, 8))[0]
    ranks.reduce = lambda x: Pending(x.mul_(2) if not sequence else x[:6] * 2)
    grad = torch.ones(6 * (2 if sequence else 1), 8)
    assert torch.equal(torch.autograd.grad(gather_stream(x, ranks), x, grad)[0], torch.full((6, 8), 2.0))
    assert (grad == 1).all()


@pytest.mark.parametrize("ranks", [TensorRanks(), Ranks(2, True)], ids=["one", "sequence"])
def test_weights_are_saved_as_themselves_so_that_zero_3_can_take_their_memory(ranks):
    h, norm, query, key_value, gate_up, down = tensors((6, 8), (8,), (8, 8), (2, H, 8), (2, 10, 8), (8, 10))
    q_TNH, _, _ = norm_query_key_value(h, norm, EPS, query, key_value, HeadShard(2, 1, 0, True), ranks)
    outs = {q_TNH: (query, key_value), gated_mlp(h, norm, EPS, gate_up, down, "gelu", ranks): (gate_up, down)}
    outs[project_add(q_TNH, query, h, ranks)] = (query,)
    for out, weights in outs.items():
        saved = out.grad_fn.saved_tensors
        assert all(any(t is weight for t in saved) for weight in weights)
        storages = {weight.data_ptr() for weight in weights}
        assert sum(t.untyped_storage().data_ptr() in storages for t in saved) == len(weights)


def test_under_sequence_parallelism_no_whole_row_of_the_model_width_is_saved():
    ranks, width, tokens = Ranks(4, True), 8, 6
    h, norm, query, key_value, gate_up, down = tensors((tokens, width), (8,), (4, 8), (2, H, 8), (2, 10, 8), (8, 10))
    q_TNH, _, _ = norm_query_key_value(h, norm, EPS, query, key_value, HeadShard(1, 1, 0, True), ranks)
    mlp = gated_mlp(h, norm, EPS, gate_up, down, "gelu", ranks)
    for out in (q_TNH, mlp):
        assert (4 * tokens, width) not in [t.shape for t in out.grad_fn.saved_tensors]
        assert (tokens, width) in [t.shape for t in out.grad_fn.saved_tensors]


@pytest.mark.parametrize(("sequence", "held"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_what_is_sent_is_what_the_design_says(sequence, held):
    """docs/design.md, "Tensor parallelism": elements of whole tensors, C tokens of width D, K/V of 2 K H."""
    ranks, tokens, width = Ranks(2, sequence), 6, 8
    h, norm, query, key_value = tensors((tokens, width), (width,), (H, width), (2, held * H, width))
    whole = held == 1  # two heads on two ranks are divided
    outs = norm_query_key_value(h, norm, EPS, query, key_value, HeadShard(1, held, 0, whole), ranks)
    row, small = (tokens * (2 if sequence else 1)) * width, 2 * tokens * 2 * H
    by_tokens = sequence and whole
    assert ranks.sent == [("gather", row)] * sequence + [("gather", small)] * by_tokens
    ranks.sent.clear()
    sum(out.sum() for out in outs).backward()
    assert sorted(ranks.sent) == sorted(
        [("gather", row)] * sequence + [("reduce", small)] * by_tokens + [("reduce", row)]
    )


@each_layout
@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input_gets_no_gradient_and_the_others_keep_theirs(frozen, ranks):
    inputs = tensors((6, 8), (8,), (2, 10, 8), (8, 10))
    gated_mlp(*inputs[:2], EPS, *inputs[2:], "gelu", ranks).sum().backward()
    wanted = [x.grad for x in inputs]
    copies = [x.detach().clone().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
    gated_mlp(*copies[:2], EPS, *copies[2:], "gelu", ranks).sum().backward()
    for i, (x, grad) in enumerate(zip(copies, wanted, strict=True)):
        assert x.grad is None if i == frozen else torch.equal(x.grad, grad)


@each_layout
def test_frozen_projections_get_no_gradient_and_the_rest_keeps_its_own(ranks):
    shard = HeadShard(2, 1, 0, True)
    inputs = tensors((6, 8), (8,), (2 * H, 8), (2, H, 8))
    copies = [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    for given in (inputs, copies):
        sum(out.sum() for out in norm_query_key_value(*given[:2], EPS, *given[2:], shard, ranks)).backward()
    assert copies[2].grad is None and copies[3].grad is None
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(copies[:2], inputs[:2], strict=True))

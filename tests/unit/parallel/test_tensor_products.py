"""The divided layers' nodes as one rank sees them: what they compute, keep, send. Several ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_gemini.parallel.collectives import Pending
from megatron_gemini.parallel.tensor.products import embed_stream, gated_mlp, norm_query_key_value, project_add
from megatron_gemini.parallel.tensor.shards import HeadShard

EPS, H = 1e-3, 4  # eps large enough that forgetting it fails


class Ranks:
    """Stands for `size` tensor-parallel ranks that all hold the same tensors, and counts what is sent."""

    def __init__(self, size: int, sequence: bool) -> None:
        self.size, self.sequence, self.sent = size, sequence, []

    def gather(self, x):
        if not self.sequence:
            return Pending(x)
        self.sent.append(("gather", x.numel() * self.size))
        return Pending(x.repeat(self.size, *[1] * (x.dim() - 1)))

    def reduce(self, x):
        self.sent.append(("reduce", x.numel()))
        return Pending(x.view(self.size, -1, *x.shape[1:]).sum(0) if self.sequence else x)


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


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("held", "first", "read"), [(1, 0, 1), (3, 1, 1), (4, 2, 2), (2, 0, 2)])
def test_queries_keys_and_values_of_one_rank_equal_torch(held, first, read, sequence):
    shard, ranks = HeadShard(2, read, first, whole=True), Ranks(1, sequence)

    def theirs(h, norm, query, key_value):
        n = norm64(h, norm)
        key, value = ((n @ w.T).unflatten(1, (-1, H))[:, first : first + read] for w in key_value)
        return (n @ query.T).unflatten(1, (-1, H)), key, value

    assert_same(
        lambda h, norm, query, key_value: norm_query_key_value(h, norm, EPS, query, key_value, shard, ranks),
        theirs,
        tensors((6, 8), (8,), (2 * H, 8), (2, held * H, 8)),
    )


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_mlp_of_one_rank_equals_torch(activation, sequence):
    act = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")

    def theirs(h, norm, gate_up, down):
        n = norm64(h, norm)
        return h + (act(n @ gate_up[0].T) * (n @ gate_up[1].T)) @ down.T

    assert_same(
        lambda h, norm, gate_up, down: gated_mlp(h, norm, EPS, gate_up, down, activation, Ranks(1, sequence)),
        theirs,
        tensors((6, 8), (8,), (2, 10, 8), (8, 10)),
    )


@pytest.mark.parametrize("sequence", [False, True])
def test_the_projection_and_the_embedding_of_one_rank_equal_torch(sequence):
    ranks = Ranks(1, sequence)
    inputs = tensors((6, 2, H), (5, 2 * H), (6, 5))
    assert_same(lambda x, w, r: project_add(x, w, r, ranks), lambda x, w, r: r + x.flatten(1) @ w.T, inputs)
    token = torch.tensor([7, 3, 4, 9, 4, 0])  # this rank holds the ids 3 to 7

    def theirs(weight):
        return F.embedding((token - 3).clamp(0, 4), weight) * ((token >= 3) & (token < 8)).unsqueeze(1)

    assert_same(lambda weight: embed_stream(token, weight, 3, ranks), theirs, tensors((5, 4)))


def test_weights_are_saved_as_themselves_so_that_zero_3_can_take_their_memory():
    ranks = Ranks(2, True)
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


def test_frozen_weights_get_no_gradient_and_the_rest_keeps_its_own():
    shard, ranks = HeadShard(2, 1, 0, True), Ranks(1, True)
    inputs = tensors((6, 8), (8,), (2 * H, 8), (2, H, 8))
    copies = [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    for given in (inputs, copies):
        sum(out.sum() for out in norm_query_key_value(*given[:2], EPS, *given[2:], shard, ranks)).backward()
    assert copies[2].grad is None and copies[3].grad is None
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(copies[:2], inputs[:2], strict=True))

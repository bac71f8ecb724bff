"""The autograd nodes of layers that are divided over tensor-parallel ranks, with their collectives.

One node a residual half-branch, as in `kernels/linear.py`, and like there the parameter itself is saved and no view of
it. With sequence parallelism a node saves its rank's stream only, and gathers it once more in the backward while the
first product runs; the input's gradient is reduced while the weights' gradients are computed.

Shape suffixes: C tokens of the (context-local) row, S tokens of this rank's stream, D model width, H head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_gemini.kernels.discarded_output import discarded_output, output_is_discarded
from megatron_gemini.kernels.linear import gated_backward, gated_forward, gated_weight_gradient
from megatron_gemini.kernels.norm import norm_backward, norm_forward
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.tensor.shards import HeadShard


def norm_query_key_value(
    h_SD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    query: torch.Tensor,
    key_value: torch.Tensor,
    shard: HeadShard,
    ranks: TensorRanks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm, then the queries of this rank's heads and the keys and values that they read, of all C tokens.

    query: [shard.query * H, D]. key_value: [2, heads held * H, D]. -> [C, query, H], [C, key, H], [C, key, H].
    Key/value heads that every rank holds are computed once among the ranks under sequence parallelism (every rank its
    tokens, then an all-gather of the small result), and by each rank for itself otherwise. The gradients of `key_value`
    where every rank holds it, and of the norm under sequence parallelism, are partial gradients.
    """
    return _NormQueryKeyValue.apply(h_SD, norm_D, eps, query, key_value, shard, ranks)


def project_add(x: torch.Tensor, weight: torch.Tensor, residual_SD: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """residual + the sum over ranks of x W^T: x [C, heads, H] of this rank, weight [D, heads * H] -> [S, D]."""
    return _ProjectAdd.apply(x, weight, residual_SD, ranks)


def gated_mlp(
    h_SD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    ranks: TensorRanks,
) -> torch.Tensor:
    """`kernels.linear.gated_mlp` of this rank's share of the inner width, summed over the ranks: [S, D]."""
    return _GatedMLP.apply(h_SD, norm_D, eps, gate_up, down, activation, ranks)


def embed_stream(token_C: torch.Tensor, weight: torch.Tensor, first: int, ranks: TensorRanks) -> torch.Tensor:
    """int64[C] -> this rank's stream of their embeddings [S, D]; weight: the rows of the ids from `first` on."""
    return _EmbedStream.apply(token_C, weight, first, ranks)


class _NormQueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        query: torch.Tensor,
        key_value: torch.Tensor,
        shard: HeadShard,
        ranks: TensorRanks,
    ) -> tuple[torch.Tensor, ...]:
        normed, inverse, scale = norm_forward(h, norm, eps)
        pending = ranks.gather(normed)
        by_tokens = shard.whole and ranks.sequence
        width = query.shape[0] // shard.query
        if by_tokens:
            pending_kv = ranks.gather(torch.mm(normed, key_value.flatten(0, 1).t()))
            whole = pending.wait()
            queries = torch.mm(whole, query.t())
            heads = pending_kv.wait().view(len(whole), 2, -1, width).narrow(2, shard.first, shard.key)
        else:
            whole = pending.wait()
            queries = torch.mm(whole, query.t())
            heads = torch.mm(whole, _rows_read(key_value, shard, width).t()).view(len(whole), 2, -1, width)
        ctx.save_for_backward(h, inverse, scale, normed, query, key_value)
        ctx.shard, ctx.ranks, ctx.by_tokens = shard, ranks, by_tokens
        return queries.view(len(whole), -1, width), *heads.unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, inverse, scale, normed, query, key_value = ctx.saved_tensors
        ranks, shard, needs = ctx.ranks, ctx.shard, ctx.needs_input_grad
        width = query.shape[0] // shard.query
        query_grad, heads_grad = grads[0].flatten(1), torch.stack(grads[1:], 1)
        pending_whole = ranks.gather(normed)
        if ctx.by_tokens:
            heads_grad = _among_all(heads_grad, shard, 2, key_value.shape[1] // width)
            pending_kv = ranks.reduce(heads_grad.flatten(1))
        normed_grad = torch.mm(query_grad, query)
        if not ctx.by_tokens:
            normed_grad.addmm_(heads_grad.flatten(1), _rows_read(key_value, shard, width))
        pending = ranks.reduce(normed_grad)
        whole = pending_whole.wait()
        query_weight_grad = torch.mm(query_grad.t(), whole) if needs[3] else None
        if ctx.by_tokens:
            of_tokens = pending_kv.wait()
            kv_weight_grad = torch.mm(of_tokens.t(), normed).view(key_value.shape) if needs[4] else None
            normed_grad = pending.wait().addmm_(of_tokens, key_value.flatten(0, 1))
        else:
            kv_weight_grad = None
            if needs[4]:
                product = torch.mm(heads_grad.flatten(1).t(), whole).view(2, shard.key, width, -1)
                kv_weight_grad = _among_all(product, shard, 1, key_value.shape[1] // width).view(key_value.shape)
            normed_grad = pending.wait()
        return *norm_backward(normed_grad, h, inverse, scale), None, query_weight_grad, kv_weight_grad, None, None


def _rows_read(key_value: torch.Tensor, shard: HeadShard, width: int) -> torch.Tensor:
    """[2, heads held * H, D] -> [2 * shard.key * H, D] of the heads that this rank's queries read."""
    return key_value.narrow(1, shard.first * width, shard.key * width).flatten(0, 1)


def _among_all(part: torch.Tensor, shard: HeadShard, dim: int, held: int) -> torch.Tensor:
    """`part` of the heads that this rank reads along `dim`, among zeros for the others of the `held` ones."""
    if shard.key == held:
        return part
    shape = list(part.shape)
    shape[dim] = held
    every = part.new_zeros(shape)
    every.narrow(dim, shard.first, shard.key).copy_(part)
    return every


class _ProjectAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, ranks: TensorRanks
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ranks = ranks
        if output_is_discarded():
            return discarded_output(residual)
        return ranks.reduce(torch.mm(x.flatten(1), weight.t())).wait().add_(residual)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole = ctx.ranks.gather(grads[0]).wait()
        weight_grad = torch.mm(whole.t(), x.flatten(1)) if ctx.needs_input_grad[1] else None
        return torch.mm(whole, weight).view(x.shape), weight_grad, grads[0], None


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: str,
        ranks: TensorRanks,
    ) -> torch.Tensor:
        normed, inverse, scale = norm_forward(h, norm, eps)
        inner, saved = gated_forward(ranks.gather(normed).wait(), gate_up, activation)
        ctx.save_for_backward(h, inverse, scale, normed, gate_up, inner, down, *saved)
        ctx.activation, ctx.ranks = activation, ranks
        if output_is_discarded():
            return discarded_output(h)
        return ranks.reduce(torch.mm(inner, down.t())).wait().add_(h)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, inverse, scale, normed, gate_up, inner, down, *saved = ctx.saved_tensors
        ranks, needs = ctx.ranks, ctx.needs_input_grad
        pending_grad, pending_whole = ranks.gather(grads[0]), ranks.gather(normed)
        grad = pending_grad.wait()
        inner_grad = torch.mm(grad, down)
        down_grad = torch.mm(grad.t(), inner) if needs[4] else None
        normed_grad, halves = gated_backward(inner_grad, gate_up, saved, ctx.activation)
        pending = ranks.reduce(normed_grad)
        whole = pending_whole.wait()
        gate_up_grad = gated_weight_gradient(halves, whole, gate_up) if needs[3] else None
        h_grad, norm_grad = norm_backward(pending.wait(), h, inverse, scale)
        return h_grad.add_(grads[0]), norm_grad, None, gate_up_grad, down_grad, None, None


class _EmbedStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, weight: torch.Tensor, first: int, ranks: TensorRanks) -> torch.Tensor:
        row = token - first
        elsewhere = (row < 0) | (row >= len(weight))
        row = row.masked_fill_(elsewhere, 0)
        ctx.save_for_backward(row, elsewhere)
        ctx.rows, ctx.ranks = len(weight), ranks
        return ranks.reduce(F.embedding(row, weight).masked_fill_(elsewhere.unsqueeze(1), 0)).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row, elsewhere = ctx.saved_tensors
        grad = ctx.ranks.gather(grads[0]).wait().masked_fill(elsewhere.unsqueeze(1), 0)
        return None, torch.ops.aten.embedding_dense_backward(grad, row, ctx.rows, -1, False), None, None

"""The node that begins a layer's attention: RMSNorm and the projections to queries, keys and values.

Shape suffixes: C tokens of this context rank, S tokens of this rank's stream, D model width, N query heads of this
rank, K key/value heads that they read, H head width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.autograd import Gradients
from megatron_gemini.kernels.norm import norm_backward, norm_forward
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.tensor.products import LayerContext


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

    query: [N H, D]. key_value: [2, heads held * H, D]. -> [C, N, H], [C, K, H], [C, K, H].
    Where every one of several ranks holds all key/value heads, each rank computes those that it reads for itself. Under
    sequence parallelism they are computed once among the ranks: each its tokens, then an all-gather of the small
    result. The gradients of `key_value` in both cases, and of the norm under sequence parallelism, are partial ones.
    """
    return _NormQueryKeyValue.apply(h_SD, norm_D, eps, query, key_value, shard, ranks)


class _QueryKeyValueContext(LayerContext):
    shard: HeadShard
    by_tokens: bool


class _NormQueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _QueryKeyValueContext,
        h: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        query: torch.Tensor,
        key_value: torch.Tensor,
        shard: HeadShard,
        ranks: TensorRanks,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed, inverse, scale = norm_forward(h, norm, eps)
        pending = ranks.gather(normed)
        by_tokens = shard.whole and ranks.sequence
        width = query.shape[0] // shard.query
        if by_tokens:
            # 1/p of the arithmetic, behind the larger gather that the queries wait for. It saves more time than its
            # bytes cost from a width of about 1,500 on an H100 (docs/design.md, "Sequence parallelism").
            pending_kv = ranks.gather(torch.mm(normed, key_value.flatten(0, 1).t()))
            whole = pending.wait()
            queries = torch.mm(whole, query.t())
            heads = pending_kv.wait().view(whole.shape[0], 2, -1, width).narrow(2, shard.first, shard.key)
        else:
            whole = pending.wait()
            queries = torch.mm(whole, query.t())
            heads = torch.mm(whole, _rows_read(key_value, shard, width).t()).view(whole.shape[0], 2, -1, width)
        ctx.save_for_backward(h, inverse, scale, normed, query, key_value)
        ctx.shard, ctx.ranks, ctx.by_tokens = shard, ranks, by_tokens
        keys, values = heads.unbind(1)
        return queries.view(whole.shape[0], -1, width), keys, values

    @staticmethod
    def backward(ctx: _QueryKeyValueContext, *grads: torch.Tensor) -> Gradients:
        h, inverse, scale, normed, query, key_value = ctx.saved_tensors
        ranks, shard, needs = ctx.ranks, ctx.shard, ctx.needs_input_grad
        width = query.shape[0] // shard.query
        # Keys and values as one tensor again: one product a weight, as in the forward.
        query_grad, heads_grad = grads[0].flatten(1), torch.cat(grads[1:], 1).flatten(1)
        # Only the weights' products wait for it, so that it runs during the first product.
        pending_whole = ranks.gather(normed)
        if ctx.by_tokens:
            # Each rank's queries read some heads of all tokens; summed, a rank has all heads of its own tokens.
            pending_kv = ranks.reduce(_among_all(heads_grad, 1, shard.first * width, key_value.shape[1]))
        normed_grad = torch.mm(query_grad, query)
        if not ctx.by_tokens:
            normed_grad.addmm_(heads_grad, _rows_read(key_value, shard, width))
        # The one sum over ranks that the queries need anyway carries the gradient through keys and values as well.
        pending = ranks.reduce(normed_grad)
        whole = pending_whole.wait()
        query_weight_grad = torch.mm(query_grad.t(), whole) if needs[3] else None
        if ctx.by_tokens:
            of_tokens = pending_kv.wait()
            # Already summed over the ranks, so it joins the stream's gradient behind the sum of the queries' part.
            kv_weight_grad = torch.mm(of_tokens.t(), normed).view(key_value.shape) if needs[4] else None
            normed_grad = pending.wait().addmm_(of_tokens, key_value.flatten(0, 1))
        else:
            kv_weight_grad = None
            if needs[4]:
                product = torch.mm(heads_grad.t(), whole)
                kv_weight_grad = _among_all(product, 0, shard.first * width, key_value.shape[1]).view(key_value.shape)
            normed_grad = pending.wait()
        return *norm_backward(normed_grad, h, inverse, scale), None, query_weight_grad, kv_weight_grad, None, None


def _rows_read(key_value: torch.Tensor, shard: HeadShard, width: int) -> torch.Tensor:
    """[2, heads held * H, D] -> [2 K H, D] of the heads that this rank's queries read."""
    if shard.key * width < key_value.shape[1]:  # a view that nothing needs costs a call in every layer
        key_value = key_value.narrow(1, shard.first * width, shard.key * width)
    return key_value.flatten(0, 1)


def _among_all(part: torch.Tensor, dim: int, first: int, held: int) -> torch.Tensor:
    """`part` with zeros for the other heads: along `dim`, [2 K H] of the heads that are read -> [2 held].

    first: where the keys that are read begin among the `held` ones of the rank; so do the values.
    """
    read = part.shape[dim] // 2
    if read == held:
        return part
    shape = list(part.shape)
    shape[dim] = 2 * held
    every = part.new_zeros(shape)
    every.unflatten(dim, (2, held)).narrow(dim + 1, first, read).copy_(part.unflatten(dim, (2, read)))
    return every

"""The calls of torch's CPU flash attention that make up a row's attention, on slots.

torch computes a causal square in blocks of 512 keys and skips little of it. Causal queries are therefore taken in
blocks here: a small square on the diagonal and the rectangle of all keys before it. Their results are merged by
log-sum-exp. In the backward each call takes the merged output and log-sum-exp and so gives its own part of the
gradient.

Shape suffixes: S slots (see `slot_mapping`; queries and keys may have different ones), N query heads, K key/value
heads, H head width, B documents of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_gemini.kernels.attention.documents import CALL_PAIRS, DocumentCalls
from megatron_gemini.kernels.attention.merge import merge_two

# Causal queries of a call: fewer compute less of what is not seen, more make better matrix products. With 128 the
# packed row of tools/bench/attention.py takes 0.31 of the padded batch's time, and 0.39 with torch's own causal call.
BLOCK = 128

# The operators behind scaled_dot_product_attention, which returns no log-sum-exp. They take [B, heads, tokens, H].
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class CausalBlock(NamedTuple):
    """Some tokens of each of several documents of one length, which lie back to back in slots.

    slot: where the first of the `documents` begins, each `length` slots long. first, last: the tokens, end exclusive.
    """

    slot: int
    documents: int
    length: int
    first: int
    last: int

    @property
    def slots(self) -> int:
        return self.documents * (self.last - self.first)

    def of(self, x_S: torch.Tensor) -> torch.Tensor:
        """A view: [S, heads, ...] -> [B, heads, last - first, ...]."""
        slots = self.documents * self.length
        # Slices that would change nothing are left out: on small rows a step is mostly the time of such calls.
        if x_S.shape[0] != slots:
            x_S = x_S[self.slot : self.slot + slots]
        x_BL = x_S.view(self.documents, self.length, *x_S.shape[1:])
        if self.last - self.first != self.length:
            x_BL = x_BL[:, self.first : self.last]
        return x_BL.transpose(1, 2)


class Call(NamedTuple):
    """again: the queries are those of the call before, which saw other keys. causal, mask: as in `Bucket` and `Run`."""

    queries: CausalBlock
    keys: CausalBlock
    causal: bool
    mask: torch.Tensor | None = None
    again: bool = False

    def biased(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.mask is None else self.mask.to(dtype)


def cpu_calls(documents: DocumentCalls) -> tuple[Call, ...]:
    """In the order of the slots, buckets first."""
    # Calls are few and large where documents are long, and one for many documents where they are short (`documents`).
    calls: list[Call] = []
    slot = 0
    for bucket, slots in zip(documents.buckets, documents.bucket_slots, strict=True):
        block = CausalBlock(slot, bucket.documents, bucket.length, 0, bucket.length)
        calls += _causal(block, block) if bucket.causal else [Call(block, block, False, bucket.mask)]
        slot += slots
    for query, query_end, key, key_end, causal in documents.runs:
        queries = CausalBlock(query, 1, query_end - query, 0, query_end - query)
        keys = CausalBlock(key, 1, key_end - key, 0, key_end - key)
        calls += _causal(queries, keys) if causal else [Call(queries, keys, False)]
    return tuple(calls)


def _causal(queries: CausalBlock, keys: CausalBlock) -> Iterator[Call]:
    """The last query sees all keys, each one before it one less."""
    count, before = queries.length, keys.length - queries.length
    block = BLOCK if _cheaper_in_blocks(queries.documents, count) else count
    for first in range(0, count, block):
        last = min(first + block, count)
        own = queries._replace(first=first, last=last)
        yield Call(own, keys._replace(first=before + first, last=before + last), True)
        if before + first:
            yield Call(own, keys._replace(last=before + first), False, again=True)


def _cheaper_in_blocks(documents: int, length: int) -> bool:
    """By pairs of a query and a key that are computed."""
    # Measured (docs/log.md): all of a square of up to 512 tokens, 0.75 of 1,024, 0.64 of 2,048; this comes near.
    whole = min(length**2, length**2 // 2 + 256 * length)
    blocks = length**2 // 2 + BLOCK * length // 2
    return documents * blocks + CALL_PAIRS * 2 * (length // BLOCK) < documents * whole


def attend_slots(
    q_SNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(out_SNH, and for the backward of every call its queries, keys, values, output and log-sum-exp, [B, N, ...])."""
    # What is saved is what the call saw: for one call, the backward of small rows then needs no view of anything.
    if len(calls) == 1:
        inputs, (out, lse) = _attend(calls[0], q_SNH, k_SKH, v_SKH, scale)
        return _to_slots(out), [*inputs, out, lse]
    out_SNH = q_SNH.new_empty(q_SNH.shape)
    lse_SN = q_SNH.new_empty(q_SNH.shape[:2], dtype=torch.promote_types(q_SNH.dtype, torch.float32))
    saved: list[torch.Tensor] = []
    for call in calls:
        inputs, part = _attend(call, q_SNH, k_SKH, v_SKH, scale)
        places = call.queries.of(out_SNH), call.queries.of(lse_SN)
        if call.again:
            part = merge_two(*places, *part)  # one after another: at most two parts of a block exist at a time
        for place, x in zip(places, part, strict=True):
            place.copy_(x)
        saved += inputs
    for i, call in enumerate(calls):  # not in the loop above: autograd refuses views from before a write
        saved[5 * i + 3 : 5 * i + 3] = call.queries.of(out_SNH), call.queries.of(lse_SN)
    return out_SNH, saved


def _attend(
    call: Call, q_SNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, scale: float | None
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
    inputs = (call.queries.of(q_SNH), call.keys.of(k_SKH), call.keys.of(v_SKH))
    return inputs, _flash(*inputs, 0.0, call.causal, attn_mask=call.biased(q_SNH.dtype), scale=scale)


def attend_slots_backward(
    grad_SNH: torch.Tensor,
    key_slots: int,
    saved: Sequence[torch.Tensor],
    calls: Sequence[Call],
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q_SNH, k_SKH and v_SKH."""
    # With out and lse of all keys, P = exp(score - lse) and delta = sum(out * grad) are the whole row's in every call,
    # so that each gives the gradient's part through its own keys.
    grads = []
    for i, call in enumerate(calls):
        inputs = (call.queries.of(grad_SNH), *saved[5 * i : 5 * i + 5])
        mask = call.biased(grad_SNH.dtype)
        grads.append(_flash_backward(*inputs, 0.0, call.causal, attn_mask=mask, scale=scale))
    if len(calls) == 1 and calls[0].keys.slots == key_slots:
        return tuple(map(_to_slots, grads[0]))
    q_grads, k_grads, v_grads = zip(*grads, strict=True)
    keys = [call.keys for call in calls]
    return (
        _sum([call.queries for call in calls], q_grads, len(grad_SNH)),
        _sum(keys, k_grads, key_slots),
        _sum(keys, v_grads, key_slots),
    )


def saved_lse(saved: Sequence[torch.Tensor], calls: Sequence[Call], slots: int) -> torch.Tensor:
    """Log-sum-exp of the scores, float32 [S, N], out of what `attend_slots` saves."""
    if len(calls) == 1:
        return _to_slots(saved[4])
    lse_SN = saved[4].new_empty(slots, saved[4].shape[1])
    for call, lse in zip(calls, saved[4::5], strict=True):
        call.queries.of(lse_SN).copy_(lse)
    return lse_SN


def lse_gradients(
    grad_SN: torch.Tensor, key_slots: int, saved: Sequence[torch.Tensor], calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q_SNH and k_SKH, given the log-sum-exp's.

    d lse / d q is scale * (P k), which is attention with the keys as values. d lse / d k, weighted by the gradient g,
    is scale * P^T (g q). That is the values' gradient of attention whose output has the gradient g q.
    """
    q_grads, k_grads = [], []
    for i, call in enumerate(calls):
        q, k, _, _, lse = saved[5 * i : 5 * i + 5]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        weight = scale * call.queries.of(grad_SN).unsqueeze(-1).to(q.dtype)
        mask = call.biased(q.dtype)
        mean, part = _flash(q, k, k, 0.0, call.causal, attn_mask=mask, scale=scale)
        mean = mean * (part - lse).exp().unsqueeze(-1).to(mean.dtype)  # a part of the keys has a part of the weight
        q_grads.append(weight * mean)
        inputs = (weight * q, q, k, k, mean, lse)
        k_grads.append(_flash_backward(*inputs, 0.0, call.causal, attn_mask=mask, scale=scale)[2])
    q_grad = _sum([call.queries for call in calls], q_grads, len(grad_SN))
    return q_grad, _sum([call.keys for call in calls], k_grads, key_slots)


def _to_slots(x: torch.Tensor) -> torch.Tensor:
    """[B, N, queries, ...] -> [S, N, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _sum(blocks: Sequence[CausalBlock], grads: Sequence[torch.Tensor], slots: int) -> torch.Tensor:
    """[B, heads, ...] of every block -> [S, heads, H]; where blocks overlap, summed in float32 at least."""
    # Every block of queries sees the keys of all blocks before it: a long document's first keys have many parts.
    first = grads[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = first.new_zeros(slots, first.shape[1], first.shape[3], dtype=dtype)
    for block, grad in zip(blocks, grads, strict=True):
        block.of(total).add_(grad)
    return total.to(first.dtype)

"""Head, cross-entropy and z-loss in one: chunk by chunk of tokens, never T x V logits at once.

Two ways to the same numbers (docs/design.md, "The loss never holds the logits"):

in the forward   The loss is a scalar whose backward follows at once. The gradients are made while a chunk's logits are
                 at hand, three matrix products in all. The weight's gradient waits for the backward in memory.
deferred         The backward comes later or may be of another loss. Nothing of the size of the weight is kept, and a
                 chunk's logits are computed again in the backward, a fourth product.

At V=65,536, T=1,024 and D=512 on a CPU the first takes 0.86 of the time of torch's linear and cross-entropy, and the
second 1.17. Both take a tenth of the memory (docs/performance.md).

The weight is handed in as the parameter itself and saved as nothing else (see `kernels/linear.py`).

Shape suffixes: T tokens, D model width, V vocabulary rows of this rank, with padding, C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.losses.gradients import scale_gradients
from megatron_gemini.kernels.losses.head_chunks import GradientSums, HeadChunks, VocabularyRows, check_head, join
from megatron_gemini.kernels.losses.softmax_chunk import Normalizer


def linear_cross_entropy(
    h_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    z_loss: float,
    first: int,
    size: int,
    group: ProcessGroup | None,
    deferred: bool = False,
    reduce_input_gradient: bool = True,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum(weight_T * nll) + z_loss * sum(weight_T * lse^2), nll_T), of the logits h W^T.

    nll is lse - the target's logit with lse = log(sum(exp(logits))); z-loss keeps the softmax's normalizer near 1
    (PaLM, section 5). The loss is a float32 scalar with a graph, nll_T float32 [T] without one; float64 for float64.

    weight_VD: rows first, first + 1, ... of a vocabulary of `size` ids, in h's dtype; rows from `size` on are padding,
        outside the softmax, with a gradient of zero. It is the parameter itself, not a view of one.
    target_T: int64 ids; a negative one, as torch's ignore_index -100, is left out: nll 0 and no gradient. An id of
        `size` or more is an error on a CPU. On a GPU, where looking for it would stall the device, its nll is infinite.
    weight_T: float, of every token. group: ranks that hold the vocabulary's other rows, None if this one has them all.
    deferred: see the head of this file. Only then may weight_T ask for a gradient.
    reduce_input_gradient: sum h's gradient over `group`; False leaves it this rank's partial gradient.
    backend: "torch" or "triton" in place of the one that `dispatch.loss_backend` names.

    Raises ValueError for shapes, dtypes, devices, sizes or ids that do not fit together.
    """
    check_head(h_TD, weight_VD, target_T, first, size, group)
    if weight_T.shape != target_T.shape or not weight_T.is_floating_point() or weight_T.device != h_TD.device:
        raise ValueError(
            f"weight_T is {weight_T.dtype} {tuple(weight_T.shape)} on {weight_T.device}; one float a target is needed, "
            f"{tuple(target_T.shape)} on {h_TD.device}"
        )
    place = VocabularyRows(first, size, group, reduce_input_gradient, backend)
    if not deferred and weight_T.requires_grad:
        raise ValueError("weight_T requires a gradient, which deferred=False does not compute; detach it or defer")
    if not deferred:
        # Within a node's forward torch has gradients off, so the node cannot ask for itself whether to make them.
        return _LossNow.apply(h_TD, weight_VD, target_T, weight_T, z_loss, torch.is_grad_enabled(), place)
    log_probability_T, lse_T = _LogProbabilities.apply(h_TD, weight_VD, target_T, place)
    weight_T = weight_T.to(lse_T.dtype)
    loss = -torch.dot(weight_T, log_probability_T)
    if z_loss:
        loss = loss + z_loss * torch.dot(weight_T, lse_T.square())
    return loss, -log_probability_T.detach()


def token_log_probabilities(
    h_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    first: int,
    size: int,
    group: ProcessGroup | None,
    reduce_input_gradient: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """log softmax(h W^T) at the targets, float32 [T] with a graph, for losses such as DPO's and PPO's.

    The arguments and errors are those of `linear_cross_entropy`; a token that is left out has log-probability 0. The
    backward computes the logits again, chunk by chunk.
    """
    check_head(h_TD, weight_VD, target_T, first, size, group)
    place = VocabularyRows(first, size, group, reduce_input_gradient, backend)
    return _LogProbabilities.apply(h_TD, weight_VD, target_T, place)[0]


class _LogProbabilityContext(NodeContext):
    place: VocabularyRows


class _LossNow(torch.autograd.Function):
    """Both gradients are made in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx: NodeContext,
        h: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        token_weight: torch.Tensor,
        z_loss: float,
        graph: bool,
        place: VocabularyRows,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = HeadChunks(h, weight, target, place)
        needs = ctx.needs_input_grad[:2] if graph else (False, False)
        gradients = GradientSums(chunks, needs) if any(needs) else None
        token_weight = chunks.without_padding(token_weight.to(chunks.dtype))
        nlls: list[torch.Tensor] = []
        terms: list[torch.Tensor] = []
        for rows in chunks.rows:
            logits = chunks.logits(rows)
            normalizer, of_target, kept = chunks.statistics(rows, logits)
            log_sum, factor = normalizer.sum_C.log(), token_weight[rows]
            nll = log_sum - (of_target - normalizer.largest_C)
            of_softmax, term = factor, nll
            if z_loss:
                # The gradient of lse is the softmax: z lse^2 adds 2 z lse to its factor, and nothing to the target's.
                lse = log_sum + normalizer.largest_C
                of_softmax, term = factor * (1 + 2 * z_loss * lse), nll + z_loss * lse.square()
            nlls.append(nll)
            terms.append(term)
            if gradients is not None:
                gradients.add(rows, chunks.gradient(rows, logits, kept, normalizer, of_softmax, factor))
        if gradients is not None:
            ctx.save_for_backward(*gradients.finish())  # type: ignore[arg-type]  # torch takes None as well
        # The sum over tokens is one dot product at the end: another length of chunks does not change its order.
        nll = chunks.without_padding(join(nlls))
        ctx.mark_non_differentiable(nll)
        return torch.dot(token_weight, chunks.without_padding(join(terms)) if z_loss else nll), nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: NodeContext, *grads: torch.Tensor) -> Gradients:
        h_grad, weight_grad = scale_gradients(ctx.saved_tensors, grads[0])
        return h_grad, weight_grad, None, None, None, None, None


class _LogProbabilities(torch.autograd.Function):
    """(log-probability of the target, lse), [T] each and both differentiable."""

    @staticmethod
    def forward(
        ctx: _LogProbabilityContext, h: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, place: VocabularyRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = HeadChunks(h, weight, target, place)
        found = [chunks.statistics(rows, chunks.logits(rows))[:2] for rows in chunks.rows]
        largest, total = (join(x) for x in zip(*(normalizer for normalizer, _ in found), strict=True))
        of_target = join([target for _, target in found])
        ctx.save_for_backward(h, weight, target, largest, total)
        ctx.place = place
        log_sum = total.log()
        return chunks.without_padding(of_target - largest - log_sum), chunks.without_padding(log_sum + largest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _LogProbabilityContext, *grads: torch.Tensor) -> Gradients:
        h, weight, target, largest, total = ctx.saved_tensors
        chunks = HeadChunks(h, weight, target, ctx.place)
        of_probability, of_lse = map(chunks.without_padding, grads)
        of_softmax, of_target = of_lse - of_probability, -of_probability
        gradients = GradientSums(chunks, ctx.needs_input_grad)
        for rows in chunks.rows:
            normalizer = Normalizer(largest[rows], total[rows])
            logits = chunks.logits(rows)
            gradients.add(rows, chunks.gradient(rows, logits, None, normalizer, of_softmax[rows], of_target[rows]))
        return *gradients.finish(), None, None

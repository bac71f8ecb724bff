"""Sigmoid loss of image-text pairs (Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training", section 3).

A pair of the batch is right or wrong by itself, without a softmax over the batch. The loss is therefore a sum over
tiles of the similarity matrix, and no rank ever needs more than one tile. Texts travel round the ring of ranks while
each rank computes with those that it has. Their gradients follow them and are at home after one round.

Of 4,096 pairs with D=512 on a CPU it takes 0.6 of the dense matrix's time and 0.065 of its memory
(docs/performance.md).

Shape suffixes: B pairs of this rank, D embedding width, C texts that are with this rank, I and J sides of a tile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.losses.gradients import scale_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sigmoid_contrastive_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    log_temperature: torch.Tensor,
    bias: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    chunk: int = 1024,
) -> torch.Tensor:
    """sum over this rank's images i and the texts j of all ranks of -log sigmoid(z_ij (t x_i . y_j + b)), a scalar.

    t = exp(log_temperature), b = bias (the paper begins with log 10 and -10); z is 1 where i and j are a pair and -1
    otherwise. A sum, as every loss here is: the paper's is the sum over all ranks divided by the pairs of all ranks.

    image_BD, text_BD: row i of both is a pair; normalized to length 1 by the caller, in one dtype; computed in float32
        (float64 for float64). Ranks may have different numbers of pairs.
    log_temperature, bias: one number each, replicated.
    group: the ranks whose pairs are one batch; all of them call together. None: this process alone.
    chunk: the sides of a tile; memory beyond the embeddings is a few tiles of chunk x chunk numbers.

    The gradients are made in the forward. Those of image_BD and text_BD are of the sum of all ranks' losses, which all
    ranks must therefore scale by the same factor. Those of log_temperature and bias are this rank's partial gradients
    of it, to be summed like all gradients of a data-parallel group.

    Raises ValueError for shapes, dtypes and devices that do not fit together, on one rank or between ranks.
    """
    inputs = (image_BD, text_BD, log_temperature, bias)
    _check(*inputs, chunk)
    group = None if group is None or group.size() == 1 else group
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    counts = [len(text_BD)] if group is None else _pairs_of_ranks(text_BD, wanted, group)
    return _SigmoidLoss.apply(*inputs, group, counts, chunk, wanted)


def _check(
    image: torch.Tensor, text: torch.Tensor, log_temperature: torch.Tensor, bias: torch.Tensor, chunk: int
) -> None:
    if image.dim() != 2 or image.shape != text.shape:
        raise ValueError(
            f"image_BD is {tuple(image.shape)} and text_BD {tuple(text.shape)}; both must be [pairs, width], row i of "
            "each is one pair"
        )
    if image.dtype != text.dtype or image.dtype not in DTYPES:
        raise ValueError(f"image_BD is {image.dtype} and text_BD {text.dtype}; both must be the same of {DTYPES}")
    for name, number in (("log_temperature", log_temperature), ("bias", bias)):
        if number.numel() != 1 or not number.is_floating_point():
            raise ValueError(f"{name} is {number.dtype} {tuple(number.shape)}; it is one floating-point number")
    devices = {tensor.device for tensor in (image, text, log_temperature, bias)}
    if len(devices) > 1:
        raise ValueError(f"the inputs are on {sorted(map(str, devices))}; move them to one device")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a tile needs at least one row, 1024 is usual")


def _pairs_of_ranks(text: torch.Tensor, wanted: bool, group: ProcessGroup) -> list[int]:
    """How many pairs every rank has. Where anything else differs, the ring would hang or read wrong numbers."""
    mine = torch.tensor([*text.shape, DTYPES.index(text.dtype), wanted], device=text.device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    found = torch.stack(everyone).tolist()
    if any(other[1:] != found[0][1:] for other in found):
        told = [f"width {width}, {DTYPES[dtype]}, gradients {bool(want)}" for _, width, dtype, want in found]
        raise ValueError(f"text_BD differs between the ranks: {'; '.join(told)}; all ranks must ask for the same")
    return [row[0] for row in found]


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: NodeContext,
        image: torch.Tensor,
        text: torch.Tensor,
        log_temperature: torch.Tensor,
        bias: torch.Tensor,
        group: ProcessGroup | None,
        counts: list[int],
        chunk: int,
        wanted: bool,
    ) -> torch.Tensor:
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        tiles = _Tiles(image.to(dtype), log_temperature.to(dtype).exp(), bias.to(dtype), chunk, wanted)
        if group is None:
            text_grad = tiles.add(text.to(dtype), paired=True)
        else:
            text_grad = _around_the_ring(tiles, text, group, counts)
        if wanted:
            # A tile's d loss / d z_ij times t x_i . y_j, summed, is every image times its gradient.
            log_temperature_grad = (tiles.image * tiles.image_grad).sum(dtype=torch.float64)
            grads = (tiles.image_grad, text_grad, log_temperature_grad, tiles.bias_grad)
            inputs = (image, text, log_temperature, bias)
            kept = [g.to(x.dtype).view(x.shape) for g, x in zip(grads, inputs, strict=True)]
            ctx.save_for_backward(*kept)
        return tiles.loss.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: NodeContext, *grads: torch.Tensor) -> Gradients:
        made = scale_gradients(ctx.saved_tensors, grads[0])
        needed = (x if need else None for x, need in zip(made, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None


class _Tiles:
    """This rank's images against texts, tile by tile, and the sums of what comes of it."""

    def __init__(
        self, image_BD: torch.Tensor, temperature: torch.Tensor, bias: torch.Tensor, chunk: int, wanted: bool
    ) -> None:
        self.image, self.temperature, self.bias, self.chunk, self.wanted = image_BD, temperature, bias, chunk, wanted
        self.image_grad = torch.zeros_like(image_BD)
        self.bias_grad = torch.zeros((), dtype=torch.float64, device=image_BD.device)
        self.loss = torch.zeros_like(self.bias_grad)

    def add(self, text_CD: torch.Tensor, paired: bool) -> torch.Tensor:
        """All images against these texts -> the gradient of the texts; paired: text i belongs to image i."""
        text_grad = torch.zeros_like(text_CD)
        scaled = text_CD * self.temperature
        for i in range(0, len(self.image), self.chunk):
            image = self.image[i : i + self.chunk]
            for j in range(0, len(text_CD), self.chunk):
                columns = slice(j, j + self.chunk)
                tile_IJ = torch.addmm(self.bias, image, scaled[columns].t())
                diagonal = tile_IJ.diagonal() if paired and i == j else None
                if diagonal is not None:
                    diagonal.neg_()  # -z (t x.y + b) everywhere
                # torch's own threshold of 20 would drop 2e-9, which float64 shows. The sum has up to B^2 terms.
                self.loss += F.softplus(tile_IJ, threshold=40).sum(dtype=torch.float64)
                if not self.wanted:
                    continue
                tile_IJ.sigmoid_()  # the derivative of softplus
                if diagonal is not None:
                    diagonal.neg_()
                self.bias_grad += tile_IJ.sum(dtype=torch.float64)
                self.image_grad[i : i + self.chunk].addmm_(tile_IJ, scaled[columns])
                text_grad[columns].addmm_(tile_IJ.t(), image)
        return text_grad.mul_(self.temperature)


class _Passing:
    """A tensor on its way to the next rank of the ring, and another one of `count` rows from the rank before."""

    def __init__(self, tensor: torch.Tensor, count: int, group: ProcessGroup, tag: int) -> None:
        ranks, rank = group.size(), group.rank()
        self.sent, self.arriving = tensor, tensor.new_empty(count, tensor.shape[1])
        # Sent and received as one batch: ranks that all sent first would wait for each other. Texts and gradients are
        # under way at the same time and have tags of their own.
        ways = ((dist.isend, self.sent, (rank + 1) % ranks), (dist.irecv, self.arriving, (rank - 1) % ranks))
        passes = [dist.P2POp(way, x, group=group, group_peer=peer, tag=tag) for way, x, peer in ways if len(x)]
        self.works = dist.batch_isend_irecv(passes) if passes else []

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


def _around_the_ring(tiles: _Tiles, text_BD: torch.Tensor, group: ProcessGroup, counts: list[int]) -> torch.Tensor:
    """The gradient of this rank's texts, from the images of all ranks.

    In step s a rank computes with the texts of rank - s while the next ones are on their way. It adds its share to the
    gradient of those texts, which comes from the rank before, and sends it on, in the last step to the texts' own rank.
    """
    ranks, rank = group.size(), group.rank()
    # Texts travel in their own dtype, gradients in that of the sums: half the bytes for texts in bfloat16.
    text, grads = text_BD.contiguous(), None
    for step in range(ranks):
        next_count, last = counts[(rank - step - 1) % ranks], step == ranks - 1
        texts = None if last else _Passing(text, next_count, group, tag=0)
        grad = tiles.add(text.to(tiles.image.dtype), paired=step == 0)
        if grads is not None:
            grad += grads.wait()
        if tiles.wanted:
            grads = _Passing(grad, next_count, group, tag=1)
        if texts is not None:
            text = texts.wait()
    return text if grads is None else grads.wait()

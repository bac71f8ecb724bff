"""One rank of the losses' test: its share of every case, from the seed, and what came of it in a file of its own.

    torchrun --nproc-per-node N -m tests.distributed.loss_cases OUT

It knows nothing of the expected results.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.engine.distributed import end_process, leave
from megatron_gemini.kernels.losses import head_chunks
from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy, token_log_probabilities
from megatron_gemini.kernels.losses.sigmoid import sigmoid_contrastive_loss
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer, TokenizerLoss
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.parameters import initialize, zeros
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary

TOKENS, WIDTH, Z_LOSS = 7, 6, 0.1
SIZES = (9, 10, 48)  # on 4 ranks: a rank of padding only, one with some, none
ZERO_SIZE = 10
TINY_TOKENIZER = ImageTokenizerConfig(image_size=4, patch=2, width=8, layers=1, heads=2, mlp_width=8, codes=6)
IMAGES = 8
PAIRS = {"equal": (3, 3, 3, 3), "unequal": (5, 0, 2, 6)}


def draw_head(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole h, weight, targets (one is left out) and token weights."""
    generator = torch.Generator().manual_seed(size)
    h, weight = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(size, WIDTH, generator=generator) * 3
    target = torch.randint(size, (TOKENS,), generator=generator)
    target[2] = -100
    return h, weight, target, torch.rand(TOKENS, generator=generator)


def draw_pairs(count: int) -> list[torch.Tensor]:
    """All images, all texts, log temperature and bias."""
    generator = torch.Generator().manual_seed(count)
    sides = [F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1) for _ in range(2)]
    return [*sides, torch.tensor(2.3), torch.tensor(-2.0)]


def head_cases(rank: int, ranks: int, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    found = {}
    for size in SIZES:
        h, weight, target, token_weight = draw_head(size)
        rows = -(-size // ranks)
        mine = torch.zeros(rows, WIDTH)
        part = weight[rank * rows : (rank + 1) * rows]
        mine[: len(part)] = part
        place = {"first": rank * rows, "size": size, "group": group}
        head_chunks.CHUNK_BYTES["cpu"] = 3 * rows * 4  # three chunks of tokens
        for name in ("now", "deferred", "partial", "log_probability"):
            inputs = [x.clone().requires_grad_() for x in (h, mine)]
            if name == "log_probability":
                per_token = token_log_probabilities(*inputs, target, **place)
                loss = F.logsigmoid(per_token.cumsum(0)).sum()
            else:
                options = {"deferred": name == "deferred", "reduce_input_gradient": name != "partial", **place}
                loss, per_token = linear_cross_entropy(*inputs, target, token_weight, z_loss=Z_LOSS, **options)
            (2 * loss).backward()
            key = f"{size}/{name}"
            found |= {f"{key}/loss": loss, f"{key}/per_token": per_token}
            found |= {f"{key}/h": inputs[0].grad, f"{key}/weight": inputs[1].grad}
    return found


def sigmoid_cases(rank: int, ranks: int, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    found = {}
    for name, counts in PAIRS.items():
        counts = counts[:ranks]
        image, text, *numbers = draw_pairs(sum(counts))
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        inputs = [x.clone().requires_grad_() for x in (image[mine], text[mine], *numbers)]
        loss = sigmoid_contrastive_loss(*inputs, group=group, chunk=2)
        (2 * loss).backward()
        found[f"{name}/loss"] = loss
        for what, x in zip(("image", "text", "log_temperature", "bias"), inputs, strict=True):
            found[f"{name}/{what}"] = x.grad
        with torch.no_grad():
            found[f"{name}/without gradients"] = sigmoid_contrastive_loss(*inputs, group=group, chunk=2)
    return found


def image_tokenizer(images: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[TokenizerLoss, torch.Tensor]:
    """The loss of some images, and all gradients of its sum over them, one behind the other."""
    tokenizer = ImageTokenizer(TINY_TOKENIZER, group)
    initialize(tokenizer, 0)
    output = tokenizer(images)
    gradients = torch.autograd.grad(output.loss * len(images), list(tokenizer.parameters()))
    return output, torch.cat([gradient.flatten() for gradient in gradients])


def draw_images() -> torch.Tensor:
    """The first and the last are the same: codes may have two nearest images, on two ranks."""
    images = torch.rand(IMAGES, 4, 4, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[-1] = images[0]
    return images


def image_tokenizer_cases(rank: int, ranks: int, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    output, gradients = image_tokenizer(draw_images().chunk(ranks)[rank], group)
    parts = {f"image tokenizer/{part}": getattr(output, part) for part in ("loss", "perplexity", "l2")}
    return {**parts, "image tokenizer/gradients": gradients}


class Head(nn.Module):
    """A vocabulary as a model holds it, whose weight ZeRO-3 takes away between forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(TensorRanks(), ZERO_SIZE, WIDTH, init=zeros())

    def forward(self, h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return self.vocabulary(h, fused=partial(linear_cross_entropy, **options))[0]


def zero3_cases(rank: int) -> dict[str, torch.Tensor]:
    """The loss of the same tokens on both data-parallel ranks, rank 1's with twice their weights."""
    import deepspeed

    h, weight, target, token_weight = draw_head(ZERO_SIZE)
    module = Head()
    with torch.no_grad():
        module.vocabulary.weight.copy_(weight)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3,  # and keep nothing for the backward
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    found = {}
    for deferred in (False, True):
        inputs = h.clone().requires_grad_()
        options = {"target_T": target, "weight_T": token_weight * (1 + rank), "z_loss": Z_LOSS, "deferred": deferred}
        loss = engine(inputs, options)
        assert module.vocabulary.weight.numel() == 0, "ZeRO-3 did not take the weight"
        engine.backward(loss)
        key = f"zero3/{deferred}"
        weight_grad = deepspeed.utils.safe_get_full_grad(module.vocabulary.weight)
        found |= {f"{key}/loss": loss, f"{key}/h": inputs.grad, f"{key}/weight": weight_grad.clone()}
        engine.step()
    return found


def error_of_different_widths(rank: int, group: dist.ProcessGroup) -> str:
    sides = [torch.zeros(2, WIDTH + rank)] * 2
    try:
        sigmoid_contrastive_loss(*sides, torch.tensor(2.3), torch.tensor(-2.0), group=group)
    except ValueError as error:
        return str(error)
    return "none"


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    found = head_cases(rank, ranks, group) | sigmoid_cases(rank, ranks, group)
    found |= image_tokenizer_cases(rank, ranks, group)
    found |= zero3_cases(rank) if ranks == 2 else {}
    found = {name: x.detach().contiguous() for name, x in found.items()}
    save_file(found, out / f"rank{rank}.safetensors")
    (out / f"rank{rank}.txt").write_text(error_of_different_widths(rank, group))
    leave()


if __name__ == "__main__":
    main()
    end_process()

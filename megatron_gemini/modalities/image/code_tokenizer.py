"""A small ViT-VQGAN (Yu et al. 2021, "Vector-quantized image modeling with improved VQGAN"): pixels to codes and back.

Shape suffixes: B images, S pixels of a side, X patches of all images (one code each), C code width, V codes.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.kernels.attention.api import AttentionPlan, plan_attention
from megatron_gemini.modalities.transformer import Transformer, grid_positions, linear
from megatron_gemini.parallel.parameters import new_parameter, normal

CHANNELS = 3
MARGIN = 0.1  # of the logit-Laplace distribution: pixels are squeezed into [0.1, 0.9], where the logit is finite
LOG_SCALE = (-3.0, 3.0)  # its scale; without a floor, a background that never changes would pay without limit
SPREAD = 0.1  # weight with which codes are drawn to encoder outputs


class TokenizerLoss(NamedTuple):
    """loss: scalar, with its graph; the parts are detached scalars.

    l2: mean squared error of pixels in [-1, 1]. logit_laplace: mean negative log-likelihood. quantization: mean
    squared distance of encoder outputs to their codes. perplexity: exp of the entropy of the codes' use in all ranks'
    images (at most the codebook's size). reconstruction: float32[B, S, S, 3] in [-1, 1]. codes: int64[B, n].
    """

    loss: torch.Tensor
    l2: torch.Tensor
    logit_laplace: torch.Tensor
    quantization: torch.Tensor
    perplexity: torch.Tensor
    reconstruction: torch.Tensor
    codes: torch.Tensor


class ImageTokenizer(nn.Module):
    """Transformer encoder, l2-normalized factorized codebook, transformer decoder; one code a patch.

    Trained on pixels alone: l2, the codebook's losses and a small logit-Laplace likelihood (Ramesh et al. 2021,
    section 3.1). The paper's adversarial and perceptual losses need networks of their own and are not used.

    ranks: those that train it together, each on as many images. The mean of their losses, and of the gradients, is then
    that of all images on one rank. Each of them calls `forward` as often, since it has collectives.
    """

    def __init__(self, config: ImageTokenizerConfig, ranks: ProcessGroup | None = None) -> None:
        super().__init__()
        if config.codes < 1:
            raise ValueError(f"image_tokenizer.codes is {config.codes}; an image tokenizer needs at least 1")
        self.config, self.ranks = config, ranks
        values = config.patch * config.patch * CHANNELS
        self.patch = linear(values, config.width)
        self.encoder = Transformer(config.width, config.layers, config.heads, config.mlp_width)
        self.to_code = linear(config.width, config.code_width)
        self.codebook = Codebook(config.codes, config.code_width, ranks)
        self.from_code = linear(config.code_width, config.width)
        self.decoder = Transformer(config.width, config.layers, config.heads, config.mlp_width)
        self.pixels = linear(config.width, 2 * values)

    def forward(self, images_BSS3: torch.Tensor) -> TokenizerLoss:
        """The training loss of float32[B, S, S, 3] in [-1, 1], a mean over the images; see the class for `ranks`."""
        config = self.config
        quantized = self.codebook(self._encode(images_BSS3))
        mean, log_scale = self._decode(quantized.vector_XC)
        reconstruction = _to_pixels(mean)
        l2 = F.mse_loss(reconstruction, images_BSS3)
        likelihood = logit_laplace(images_BSS3, mean, log_scale)
        codebook_loss = quantized.distance_to_codes + config.commitment * quantized.distance_to_outputs
        loss = config.l2_weight * l2 + config.logit_laplace_weight * likelihood + codebook_loss
        return TokenizerLoss(
            loss=loss + SPREAD * quantized.spread,
            l2=l2.detach(),
            logit_laplace=likelihood.detach(),
            quantization=quantized.distance_to_codes.detach(),
            perplexity=perplexity(quantized.code_X, config.codes, self.ranks),
            reconstruction=reconstruction.detach().clamp(-1, 1),
            codes=quantized.code_X.view(len(images_BSS3), -1),
        )

    @torch.no_grad()
    def encode(self, images_BSS3: torch.Tensor) -> torch.Tensor:
        """int64[B, codes_per_image] of float32[B, S, S, 3] in [-1, 1], codes in the order row, column."""
        return self.codebook(self._encode(images_BSS3)).code_X.view(len(images_BSS3), -1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """float32[B, S, S, 3] in [-1, 1] of int64[B, codes_per_image]. Raises ValueError for other codes."""
        if codes.ndim != 2 or codes.shape[1] != self.config.codes_per_image:
            raise ValueError(f"codes are {tuple(codes.shape)}; an image takes {self.config.codes_per_image}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codes:
            raise ValueError(f"image codes must be 0 to {self.config.codes - 1}, not {codes.min()} to {codes.max()}")
        mean, _ = self._decode(self.codebook.vectors(codes.flatten()))
        return _to_pixels(mean).clamp(-1, 1)

    def _encode(self, images_BSS3: torch.Tensor) -> torch.Tensor:
        """[X, C], not yet normalized."""
        size = self.config.image_size
        if images_BSS3.shape[1:] != (size, size, CHANNELS):
            raise ValueError(f"images are {tuple(images_BSS3.shape)}; the tokenizer takes [B, {size}, {size}, 3]")
        side = size // self.config.patch
        tiles = images_BSS3.view(-1, side, self.config.patch, side, self.config.patch, CHANNELS)
        h_XD = self.patch(tiles.transpose(2, 3).reshape(len(images_BSS3) * side * side, -1))
        return self.to_code(self.encoder(*self._placed(h_XD)))

    def _decode(self, vector_XC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean of the logit and logarithm of the scale of every pixel, [B, S, S, 3] each."""
        size, patch = self.config.image_size, self.config.patch
        side = size // patch
        h_XD = self.decoder(*self._placed(self.from_code(vector_XC)))
        tiles = self.pixels(h_XD).view(-1, side, side, patch, patch, 2, CHANNELS).transpose(2, 3)
        mean, log_scale = tiles.reshape(-1, size, size, 2, CHANNELS).unbind(3)
        return mean, log_scale.clamp(*LOG_SCALE)

    def _placed(self, h_XD: torch.Tensor) -> tuple[torch.Tensor, AttentionPlan]:
        """Rows with their 2D positions added, and the plan by which patches see only their own image."""
        side = self.config.image_size // self.config.patch
        place = torch.arange(side * side, device=h_XD.device)
        position = grid_positions(place // side, place % side, h_XD.shape[1]).to(h_XD.dtype)
        images = len(h_XD) // (side * side)
        placed = (h_XD.view(images, side * side, -1) + position).view_as(h_XD)
        return placed, _plan(images, side * side, h_XD.device)


# Training has one batch size, so the plan of its attention is made once and not every step.
@functools.lru_cache(maxsize=8)
def _plan(images: int, patches: int, device: torch.device) -> AttentionPlan:
    image_X = torch.arange(1, images + 1, dtype=torch.int32, device=device).repeat_interleave(patches)
    return plan_attention(image_X, image_X)


class Quantized(NamedTuple):
    """code_X: int64. vector_XC: the codes' unit vectors, whose gradient passes straight to the encoder's outputs.

    distance_to_codes moves only codes, distance_to_outputs only the encoder (its commitment); both are means of
    squared distances. spread moves every code towards the encoder output nearest to it, of all ranks' outputs; only its
    mean over the ranks has a meaning.
    """

    code_X: torch.Tensor
    vector_XC: torch.Tensor
    distance_to_codes: torch.Tensor
    distance_to_outputs: torch.Tensor
    spread: torch.Tensor


class Codebook(nn.Module):
    """Unit vectors, looked up by cosine.

    A code that no output chooses has no gradient from the usual losses and stays unused. Restarting such codes would
    need a state; instead a small loss draws every code to its nearest output. Which rank has that, the ranks find out
    with two sums of the codebook's size.
    """

    def __init__(self, codes: int, width: int, ranks: ProcessGroup | None = None) -> None:
        super().__init__()
        self.ranks = ranks
        self.weight = new_parameter(codes, width, init=normal(1.0))

    def forward(self, output_XC: torch.Tensor) -> Quantized:
        """The nearest code of every encoder output [X, C]."""
        output_XC = F.normalize(output_XC, dim=-1)
        codes_VC = F.normalize(self.weight, dim=-1)
        cosine_XV = output_XC.detach() @ codes_VC.T
        code_X = cosine_XV.argmax(dim=-1)
        nearest_XC = codes_VC.index_select(0, code_X)
        return Quantized(
            code_X=code_X,
            # The value of the code with the gradient of the output (straight-through: van den Oord et al. 2017).
            vector_XC=output_XC + (nearest_XC - output_XC).detach(),
            distance_to_codes=_squared_distance(nearest_XC, output_XC.detach()),
            distance_to_outputs=_squared_distance(nearest_XC.detach(), output_XC),
            # |a - b|^2 = 2 - 2 a.b of unit vectors. The outputs are detached in the cosine: spread moves codes alone.
            spread=(2.0 - 2.0 * self._largest(cosine_XV)).mean(),
        )

    def _largest(self, cosine_XV: torch.Tensor) -> torch.Tensor:
        """[V]: largest cosine of every code with an output. With ranks, a part of it, whose mean over them is it."""
        mine_V = cosine_XV.amax(dim=0)
        if self.ranks is None or self.ranks.size() == 1:
            return mine_V
        largest_V = mine_V.detach().to(torch.float32, copy=True)  # the backward of `amax` needs its own as it is
        dist.all_reduce(largest_V, dist.ReduceOp.MAX, group=self.ranks)
        # Outputs that are equally near share the gradient, as `amax` shares it between those of one rank.
        nearest_V = (cosine_XV.detach() == largest_V.to(cosine_XV.dtype)).sum(dim=0).float()
        everywhere_V = nearest_V.clone()
        dist.all_reduce(everywhere_V, group=self.ranks)
        return mine_V * (self.ranks.size() * nearest_V / everywhere_V).to(mine_V.dtype)

    def vectors(self, code_X: torch.Tensor) -> torch.Tensor:
        """float[X, C]: unit vectors of codes."""
        return F.normalize(self.weight, dim=-1).index_select(0, code_X)


def _squared_distance(a_XC: torch.Tensor, b_XC: torch.Tensor) -> torch.Tensor:
    return (a_XC - b_XC).square().sum(dim=-1).mean()


def _to_pixels(mean: torch.Tensor) -> torch.Tensor:
    """The logit's mean as a pixel in [-1, 1] (a little beyond where the model overshoots)."""
    # Undoes the squeeze of `logit_laplace` into [MARGIN, 1 - MARGIN].
    return ((torch.sigmoid(mean) - MARGIN) / (1 - 2 * MARGIN)) * 2 - 1


def logit_laplace(images: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of pixels in [-1, 1] under the logit-Laplace distribution (DALL-E, eq. 2)."""
    squeezed = (images + 1) / 2 * (1 - 2 * MARGIN) + MARGIN
    distance = (torch.logit(squeezed) - mean).abs() * torch.exp(-log_scale)
    # With x squeezed and b the scale: -log p = |logit(x) - mean| / b + log(2 b x (1 - x)).
    return (distance + log_scale + math.log(2) + torch.log(squeezed * (1 - squeezed))).mean()


@torch.no_grad()
def perplexity(codes: torch.Tensor, size: int, ranks: ProcessGroup | None = None) -> torch.Tensor:
    """Scalar exp(entropy) of the codes' frequencies, over all ranks: how many codes are in even use."""
    counts = torch.bincount(codes.flatten(), minlength=size).float()
    if ranks is not None and ranks.size() > 1:
        dist.all_reduce(counts, group=ranks)
    share = counts / counts.sum()
    # xlogy is 0 at 0, so that codes without use add nothing.
    return torch.exp(-torch.xlogy(share, share).sum())


def psnr(reconstruction: torch.Tensor, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], from the mean squared error over all of them."""
    return decibels(float(F.mse_loss(reconstruction.double(), images.double())))


def decibels(error: float) -> float:
    """Peak signal-to-noise ratio of a mean squared error of pixels in [-1, 1]."""
    # The peak is 2, from -1 to 1, and 4 its square. Equal images have 126 dB by the bound, not infinity.
    return 10 * math.log10(4.0 / max(error, 1e-12))


def fingerprint(tokenizer: ImageTokenizer) -> str:
    """The name of a tokenizer in the codes that it makes: 16 hexadecimal digits of a hash of all weights by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

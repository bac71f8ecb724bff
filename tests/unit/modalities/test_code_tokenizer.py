"""The image code tokenizer: its losses equal references, its gradients go where they should, and it learns."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.modalities.image.code_tokenizer import (
    MARGIN,
    Codebook,
    ImageTokenizer,
    logit_laplace,
    perplexity,
    psnr,
)
from megatron_gemini.parallel.parameters import initialize

CONFIG = ImageTokenizerConfig(image_size=8, patch=4, width=32, layers=1, heads=2, mlp_width=48, codes=32, code_width=4)


def _tokenizer(seed: int = 0) -> ImageTokenizer:
    tokenizer = ImageTokenizer(CONFIG)
    initialize(tokenizer, seed)
    return tokenizer


def _images(count: int, seed: int = 0) -> torch.Tensor:
    """Four quadrants, each of one of five greys."""
    grey = torch.randint(0, 5, (count, 2, 2, 1), generator=torch.Generator().manual_seed(seed)) / 2 - 1
    return grey.repeat_interleave(4, 1).repeat_interleave(4, 2).expand(-1, -1, -1, 3).contiguous()


def test_it_learns_to_reconstruct_with_many_codes():
    tokenizer = _tokenizer()
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=6e-3, betas=(0.9, 0.95))
    for step in range(200):
        optimizer.zero_grad()
        tokenizer(_images(32, seed=step)).loss.backward()
        optimizer.step()
    validation = _images(64, seed=10_000)
    codes = tokenizer.encode(validation)
    assert psnr(tokenizer.decode(codes), validation) > 22
    assert len(codes.unique()) >= 5


def test_codes_and_pixels_have_the_stated_shapes():
    tokenizer, images = _tokenizer(), _images(3)
    output = tokenizer(images)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, output.codes)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, output.reconstruction)
    assert output.loss.ndim == 0


def test_an_image_does_not_depend_on_its_batch():
    tokenizer, images = _tokenizer(), _images(5)
    torch.testing.assert_close(tokenizer(images).reconstruction[2:3], tokenizer(images[2:3]).reconstruction)


def test_mean_over_halves_is_the_loss_of_the_whole_but_for_the_spread():
    tokenizer, images = _tokenizer(), _images(8)
    whole, halves = tokenizer(images), [tokenizer(half) for half in images.split(4)]
    for part in ("l2", "logit_laplace", "quantization"):
        mean = sum(getattr(half, part) for half in halves) / 2
        torch.testing.assert_close(getattr(whole, part), mean, rtol=1e-5, atol=1e-6)


def test_lookup_is_the_nearest_code_by_cosine_and_the_gradient_passes_straight():
    book = Codebook(16, 4)
    torch.nn.init.normal_(book.weight)
    output_XC = torch.randn(20, 4, requires_grad=True)
    quantized = book(output_XC)
    unit, codes = F.normalize(output_XC.detach(), dim=-1), F.normalize(book.weight.detach(), dim=-1)
    assert torch.equal(quantized.code_X, torch.cdist(unit, codes).argmin(dim=1))
    torch.testing.assert_close(quantized.vector_XC, codes[quantized.code_X])
    expected = (unit - codes[quantized.code_X]).square().sum(1).mean()
    torch.testing.assert_close(quantized.distance_to_codes, expected)
    torch.testing.assert_close(quantized.distance_to_outputs, expected)
    direction = torch.randn(20, 4)
    (straight,) = torch.autograd.grad((quantized.vector_XC * direction).sum(), output_XC, retain_graph=True)
    (plain,) = torch.autograd.grad((F.normalize(output_XC, dim=-1) * direction).sum(), output_XC)
    torch.testing.assert_close(straight, plain)


def test_each_codebook_loss_moves_only_its_side():
    book = Codebook(16, 4)
    torch.nn.init.normal_(book.weight)
    output_XC = torch.randn(3, 4, requires_grad=True)
    quantized = book(output_XC)

    def gradients(loss: torch.Tensor) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(loss, [output_XC, book.weight], retain_graph=True, allow_unused=True))

    output_grad, code_grad = gradients(quantized.distance_to_codes)
    assert output_grad is None
    assert code_grad is not None and (code_grad != 0).any(dim=1).sum() == len(quantized.code_X.unique())
    output_grad, code_grad = gradients(quantized.distance_to_outputs)
    assert output_grad is not None and code_grad is None
    output_grad, code_grad = gradients(quantized.spread)
    assert output_grad is None
    assert code_grad is not None and (code_grad != 0).any(dim=1).all()  # unused codes too


def test_logit_laplace_equals_torchs_own_distributions():
    images, mean = torch.rand(2, 4, 4, 3) * 2 - 1, torch.randn(2, 4, 4, 3)
    log_scale = torch.randn(2, 4, 4, 3)
    squeezed = (images + 1) / 2 * (1 - 2 * MARGIN) + MARGIN
    laplace = torch.distributions.TransformedDistribution(
        torch.distributions.Laplace(mean, log_scale.exp()), [torch.distributions.SigmoidTransform()]
    )
    torch.testing.assert_close(logit_laplace(images, mean, log_scale), -laplace.log_prob(squeezed).mean())


def test_perplexity_and_psnr_of_known_cases():
    assert perplexity(torch.arange(8), 8).item() == pytest.approx(8)
    assert perplexity(torch.zeros(9, dtype=torch.int64), 8).item() == pytest.approx(1)
    images = torch.zeros(2, 3)
    assert psnr(images + 0.2, images) == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)


def test_wrong_input_is_named():
    tokenizer = _tokenizer()
    with pytest.raises(ValueError, match=r"\[B, 8, 8, 3\]"):
        tokenizer(torch.zeros(1, 16, 16, 3))
    with pytest.raises(ValueError, match="takes 4"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="0 to 31"):
        tokenizer.decode(torch.full((1, 4), 32))
    with pytest.raises(ValueError, match="codes is 0"):
        ImageTokenizer(ImageTokenizerConfig(codes=0))


def test_every_parameter_says_how_it_begins_and_learns():
    tokenizer = _tokenizer()
    tokenizer(_images(4)).loss.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.placement.global_shape == tuple(parameter.shape)
        assert parameter.grad is not None and np.isfinite(parameter.grad.numpy()).all(), name

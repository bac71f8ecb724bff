"""On several ranks the losses equal the whole computed in float64 by one process that shares no code with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.distributed.loss_cases import (
    IMAGES,
    PAIRS,
    SIZES,
    Z_LOSS,
    ZERO_SIZE,
    draw_head,
    draw_images,
    draw_pairs,
    image_tokenizer,
)
from tests.ranks import run_ranks

MODES = ("now", "deferred", "partial", "log_probability")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda ranks: f"{ranks} ranks")
def results(request, tmp_path_factory):
    """(every rank's tensors, every rank's error); one launch for all cases."""
    out = tmp_path_factory.mktemp("loss")
    ended = run_ranks("tests.distributed.loss_cases", request.param, out, log=out / "log")
    assert ended.status == 0, ended.output
    ranks = range(request.param)
    return [load_file(out / f"rank{r}.safetensors") for r in ranks], [(out / f"rank{r}.txt").read_text() for r in ranks]


def assert_close(found, wanted, rtol=1e-5):
    torch.testing.assert_close(
        found.double(), wanted.detach(), rtol=rtol, atol=rtol * float(wanted.detach().abs().max() + 1)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_a_divided_vocabulary_has_the_loss_and_gradients_of_the_whole(results, size, mode):
    found, _ = results
    h, weight, target, token_weight = draw_head(size)
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ weight.T
    per_token = F.cross_entropy(logits, target, reduction="none")
    if mode == "log_probability":
        per_token = -per_token
        loss = F.logsigmoid(per_token.cumsum(0)).sum()
    else:
        square = logits.logsumexp(-1).square() * (target >= 0)
        loss = (token_weight.double() * (per_token + Z_LOSS * square)).sum()
    h_grad, weight_grad = torch.autograd.grad(2 * loss, (h, weight))
    for rank in found:
        assert_close(rank[f"{size}/{mode}/loss"], loss)
        assert_close(rank[f"{size}/{mode}/per_token"], per_token)
    h_grads = [rank[f"{size}/{mode}/h"] for rank in found]
    if mode == "partial":
        assert_close(torch.stack(h_grads).sum(0), h_grad)
        assert not torch.equal(h_grads[0], h_grads[1])
    else:
        assert_close(h_grads[0], h_grad)
        assert all(torch.equal(h_grads[0], other) for other in h_grads)  # or replicated weights drift apart
    grads = torch.cat([rank[f"{size}/{mode}/weight"] for rank in found])
    assert_close(grads[:size], weight_grad)
    assert (grads[size:] == 0).all()


@pytest.mark.parametrize("results", [2], indirect=True, ids=["2 ranks"])  # where loss_cases has a ZeRO-3 part
@pytest.mark.parametrize("deferred", [False, True], ids=["now", "deferred"])
def test_a_weight_that_zero_3_takes_away_after_the_forward_gets_its_gradient(results, deferred):
    found, _ = results
    h, weight, target, token_weight = draw_head(ZERO_SIZE)
    h, weight = h.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ weight.T
    square = logits.logsumexp(-1).square() * (target >= 0)
    loss = (token_weight.double() * (F.cross_entropy(logits, target, reduction="none") + Z_LOSS * square)).sum()
    h_grad, weight_grad = torch.autograd.grad(loss, (h, weight))
    for number, rank in enumerate(found):
        assert_close(rank[f"zero3/{deferred}/loss"], loss * (1 + number))
        assert_close(rank[f"zero3/{deferred}/h"], h_grad * (1 + number))
        assert_close(rank[f"zero3/{deferred}/weight"], weight_grad * 1.5)  # DeepSpeed averages over the ranks


@pytest.mark.parametrize("name", PAIRS)
def test_texts_that_go_round_the_ring_give_the_dense_sigmoid_loss(results, name):
    found, _ = results
    inputs = [x.double().requires_grad_() for x in draw_pairs(sum(PAIRS[name][: len(found)]))]
    image, text, log_temperature, bias = inputs
    logits = image @ text.T * log_temperature.exp() + bias
    loss = -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum()
    grads = torch.autograd.grad(2 * loss, inputs)
    assert_close(sum(rank[f"{name}/loss"].double() for rank in found), loss)
    assert_close(sum(rank[f"{name}/without gradients"].double() for rank in found), loss)
    assert_close(torch.cat([rank[f"{name}/image"] for rank in found]), grads[0])
    assert_close(torch.cat([rank[f"{name}/text"] for rank in found]), grads[1])
    assert_close(sum(rank[f"{name}/log_temperature"].double() for rank in found), grads[2])
    assert_close(sum(rank[f"{name}/bias"].double() for rank in found), grads[3])


def test_the_image_tokenizer_has_the_loss_and_gradients_of_all_images_together(results):
    """As one rank, which sees all of them: a code is drawn to the nearest output of any rank."""
    found, _ = results
    whole, gradients = image_tokenizer(draw_images(), None)
    for part in ("loss", "l2"):
        mean = torch.stack([rank[f"image tokenizer/{part}"] for rank in found]).mean()
        torch.testing.assert_close(mean, getattr(whole, part).detach(), rtol=1e-5, atol=0)
    for rank in found:
        torch.testing.assert_close(rank["image tokenizer/perplexity"], whole.perplexity)
    summed = torch.stack([rank["image tokenizer/gradients"] for rank in found]).sum(0)
    torch.testing.assert_close(summed, gradients, rtol=1e-5, atol=1e-5 * float(gradients.abs().max()))
    assert len(gradients) > 0 and IMAGES % len(found) == 0


def test_ranks_that_disagree_on_the_width_all_raise_an_error_that_tells_both(results):
    _, errors = results
    assert len(set(errors)) == 1
    assert "text_BD differs between the ranks: width 6" in errors[0] and "width 7" in errors[0]

"""The losses on a GPU, at sizes that training has, against float64; and what only a GPU does differently."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy, token_log_probabilities
from megatron_gemini.kernels.losses.sigmoid import sigmoid_contrastive_loss
from tools.bench.loss import peak_bytes

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
PLACE = {"first": 0, "group": None}


def draw(tokens, size, width, dtype, padding=0):
    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(tokens, width, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(size + padding, width, generator=generator, device="cuda") * 2 * width**-0.5
    target = torch.randint(size, (tokens,), generator=generator, device="cuda")
    target[::7] = -100
    return h, weight.to(dtype).requires_grad_(), target, torch.rand(tokens, generator=generator, device="cuda")


def relative(found, wanted):
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def exact_float32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("deferred", [False, True], ids=["now", "deferred"])
@pytest.mark.parametrize(("tokens", "size"), [(1, 9), (1000, 32_003), (2048, 65_536)])
def test_equals_float64(dtype, backend, deferred, tokens, size):
    h, weight, target, token_weight = draw(tokens, size, 256, dtype, padding=5)
    options = {"z_loss": 1e-2, "deferred": deferred, "backend": backend, "size": size, **PLACE}
    loss, nll = linear_cross_entropy(h, weight, target, token_weight, **options)
    grads = torch.autograd.grad(3 * loss, (h, weight))
    logits = h.double() @ weight.double()[:size].T
    wanted_nll = F.cross_entropy(logits, target, reduction="none")
    square = logits.logsumexp(-1).square() * (target >= 0)
    wanted = (token_weight.double() * (wanted_nll + 1e-2 * square)).sum()
    if tokens == 1:  # the only token is left out
        assert loss == 0 and nll == 0 and all((grad == 0).all() for grad in grads)
        return
    assert relative(loss, wanted) < BOUNDS[dtype] and relative(nll, wanted_nll) < BOUNDS[dtype]
    for found, expected in zip(grads, torch.autograd.grad(3 * wanted, (h, weight)), strict=True):
        assert relative(found, expected) < BOUNDS[dtype]


def test_many_chunks_equal_one(monkeypatch):
    from megatron_gemini.kernels.losses import head_chunks

    h, weight, target, token_weight = draw(1024, 8192, 128, torch.bfloat16)
    found = []
    for size in (1 << 30, 1 << 20):
        monkeypatch.setitem(head_chunks.CHUNK_BYTES, "cuda", size)
        loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.0, size=8192, **PLACE)
        found.append((loss, *torch.autograd.grad(loss, (h, weight))))
    assert all(relative(many, one) < 5e-3 for many, one in zip(*found, strict=True))


def test_an_id_outside_the_vocabulary_gives_an_infinite_loss_and_no_crash():
    h, weight, target, token_weight = draw(64, 100, 32, torch.float32)
    target[3] = 100
    for backend in ("torch", "triton"):
        loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.0, size=100, backend=backend, **PLACE)
        loss.backward()
        assert loss.isinf()
    torch.cuda.synchronize()


def test_nothing_waits_for_the_device():
    """The loss enqueues its work; a look at a value on the device would stall every step."""
    h, weight, target, token_weight = draw(256, 1000, 64, torch.bfloat16)
    options = {"size": 1000, **PLACE}
    linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, **options)[0].backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, **options)[0].backward()
        token_log_probabilities(h, weight, target, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_is_a_chunk_and_the_gradients():
    tokens, size, width = 8192, 131_072, 256
    h, weight, target, token_weight = draw(tokens, size, width, torch.bfloat16)

    def step():
        linear_cross_entropy(h, weight, target, token_weight, z_loss=0.0, size=size, **PLACE)[0].backward()

    step()
    h.grad = weight.grad = None
    chunk, float32_sum, gradients = 1 << 30, 4 * size * width, 2 * width * (tokens + size)
    assert peak_bytes(step, torch.device("cuda")) < 1.2 * (chunk + float32_sum + gradients) < 4 * tokens * size


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_sigmoid_loss_equals_the_dense_matrix(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    sides = [F.normalize(torch.randn(3000, 128, generator=generator, device="cuda"), dim=1).to(dtype) for _ in range(2)]
    inputs = [
        x.requires_grad_() for x in (*sides, torch.tensor(2.3, device="cuda"), torch.tensor(-10.0, device="cuda"))
    ]
    loss = sigmoid_contrastive_loss(*inputs, chunk=1024)
    image, text, log_temperature, bias = (x.double() for x in inputs)
    logits = image @ text.T * log_temperature.exp() + bias
    wanted = -F.logsigmoid((2 * torch.eye(3000, device="cuda") - 1) * logits).sum()
    assert relative(loss, wanted) < 1e-5
    for found, expected in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert relative(found, expected) < BOUNDS[dtype]

"""Runs the loss's Triton kernels on the CPU and prints, as JSON, how far each case is from float64.

    TRITON_INTERPRET=1 python -m tests.unit.kernels.loss_kernel_cases

A process of its own, because Triton reads the variable when it is imported. The outputs are poisoned beforehand.
"""

from __future__ import annotations

import itertools
import json

import torch

from megatron_gemini.kernels.losses import softmax_chunk_triton as kernels
from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy, token_log_probabilities
from megatron_gemini.kernels.losses.softmax_chunk import Labels, Normalizer
from tests.unit.kernels.test_linear_loss import draw, place, reference, relative

SIZES = (1, 5, 4096, 4097, 9000)  # columns: less than a block, a block, a column more, several
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def chunk_case(columns: int, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """The two kernels by themselves, on logits whose rows are not contiguous and with targets that others hold."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 3
    buffer = torch.full((tokens, columns + 7), torch.nan, dtype=dtype)  # what lies behind the columns must not be read
    logits = buffer[:, :columns]
    logits.copy_(torch.randn(tokens, columns, generator=generator) * 10)
    exact = logits.double()
    held = torch.tensor([True, False, True])
    labels = Labels(torch.randint(columns, (tokens,), generator=generator), held)
    of_softmax, of_target = torch.rand(2, tokens, generator=generator)
    normalizer, target, _ = kernels.statistics(logits, labels)
    everyone = Normalizer(normalizer.largest_C + 2, normalizer.sum_C * 1.5)  # as if other ranks had more
    lse = everyone.largest_C.double() + everyone.sum_C.double().log()
    wanted = (exact - lse[:, None]).exp() * of_softmax.double()[:, None]
    wanted[torch.arange(tokens), labels.column_C] -= of_target.double() * held
    found = kernels.gradient(logits, None, everyone, of_softmax, of_target, labels)
    of_target_wanted = exact.gather(1, labels.column_C[:, None])[:, 0].masked_fill(~held, -torch.inf)
    return {
        "largest": relative(normalizer.largest_C, exact.amax(-1)),
        "sum": relative(normalizer.sum_C, (exact - exact.amax(-1, keepdim=True)).exp().sum(-1)),
        "target": 0.0 if torch.equal(target.double(), of_target_wanted) else 1.0,
        "gradient": relative(found, wanted),
        "in place": 0.0 if found.data_ptr() == buffer.data_ptr() and buffer[:, columns:].isnan().all() else 1.0,
    }


def loss_case(dtype: torch.dtype, deferred: bool, seed: int) -> dict[str, float]:
    """The whole loss on this backend, with padding and a token that is left out."""
    h, weight, target, token_weight = draw(5, 40, 37, seed=seed, dtype=dtype, ignored=1)
    options = {"z_loss": 0.1, "deferred": deferred, "backend": "triton", **place(37)}
    loss, nll = linear_cross_entropy(h, weight, target, token_weight, **options)
    wanted, wanted_nll = reference(h, weight, target, token_weight, 0.1, 37)
    found = torch.autograd.grad(2 * loss, (h, weight))
    names, expected = ("h", "weight"), torch.autograd.grad(2 * wanted, (h, weight))
    errors = {name: relative(a, b.double()) for name, a, b in zip(names, found, expected, strict=True)}
    return {"loss": relative(loss, wanted), "nll": relative(nll, wanted_nll), **errors}


def main() -> None:
    found = {}
    for number, (columns, (name, dtype)) in enumerate(itertools.product(SIZES, DTYPES.items())):
        found[f"{name} {columns} columns"] = chunk_case(columns, dtype, number)
    for number, ((name, dtype), deferred) in enumerate(itertools.product(DTYPES.items(), (False, True))):
        found[f"{name} deferred={deferred}"] = loss_case(dtype, deferred, number)
    h, weight, target, _ = draw(0, 9, 9)
    found["float32 no tokens"] = {
        "length": float(len(token_log_probabilities(h, weight, target, backend="triton", **place(9))))
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

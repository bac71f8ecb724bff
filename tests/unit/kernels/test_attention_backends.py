"""Every backend runs when it is named and no other does; what cannot run, or does not fit, is an error with names."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_gemini.kernels.attention import dispatch, flash
from megatron_gemini.kernels.attention.api import attention, attention_backend, attention_with_lse, plan_attention
from megatron_gemini.kernels.attention.dispatch import AttentionRequest, choose_backend
from megatron_gemini.kernels.attention.reference import attend_densely
from megatron_gemini.kernels.rope import rope_cos_sin
from tests.attention_rows import heads, only_backend, row

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu", "sdpa", "flex"])  # "triton": interpreted_attention.py; the others: tests/gpu
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_backend_that_is_named_runs_and_no_other_does(monkeypatch, name):
    only_backend(monkeypatch, name)
    plan = plan_attention(*row([7, 5], [(2, 6)], 2), torch.tensor([1, 2, 3, 9, 10, 13]))
    inputs = heads(14, 4, 2, queries=6)
    wanted, _ = attend_densely(*inputs, plan)
    with torch.set_grad_enabled(name != "flex"):
        out = attention(*inputs, plan, backend=name)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)


def test_flex_has_no_backward_on_the_cpu_and_says_so():
    with pytest.raises(ValueError, match="no backward on the CPU"):
        attention(*heads(4, 2, 1), plan_attention(*row([4], [], 0)), backend="flex")


def test_naming_a_backend_would_show_if_another_ran(monkeypatch):
    only_backend(monkeypatch, "sdpa")
    with pytest.raises(AssertionError, match="cpu ran"):
        attention(*heads(4, 2, 1), plan_attention(*row([4], [], 0)))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("triton", "TRITON_INTERPRET=1"),
        ("flash-attn", "CUDA, not cpu"),
        ("cuda", "there are cpu, flash-attn, triton"),
    ],
)
def test_a_backend_that_cannot_run_says_why(name, says):
    with pytest.raises(ValueError, match=says):
        attention(*heads(4, 2, 1), plan_attention(*row([4], [], 0)), backend=name)


def test_the_log_sum_exp_goes_to_a_backend_that_has_it():
    with pytest.raises(ValueError, match="no log-sum-exp"):
        attention_with_lse(*heads(4, 2, 1), plan_attention(*row([4], [], 0)), backend="sdpa")


@pytest.mark.parametrize(
    ("version", "dtype", "width", "sequences", "with_lse", "wanted"),
    [
        (None, torch.bfloat16, 128, True, False, "triton"),
        (3, torch.bfloat16, 128, True, False, "flash-attn"),
        (3, torch.bfloat16, 128, False, False, "triton"),
        (3, torch.bfloat16, 128, True, True, "triton"),
        (3, torch.float32, 128, True, False, "triton"),
        (2, torch.bfloat16, 128, True, False, "triton"),
        *((None, torch.bfloat16, width, False, False, "triton") for width in (64, 80, 96, 128, 256)),
        *((None, torch.bfloat16, width, False, False, "flex") for width in (32, 72, 81, 512)),
        (2, torch.bfloat16, 256, True, False, "triton"),
        (2, torch.bfloat16, 72, True, False, "flash-attn-2"),
        (2, torch.bfloat16, 72, False, False, "flex"),
    ],
)
def test_a_card_takes_the_first_backend_that_is_able(monkeypatch, version, dtype, width, sequences, with_lse, wanted):
    found = None if version is None else (version, None)
    monkeypatch.setattr(dispatch, "installed_flash_attention", lambda: found)
    monkeypatch.setattr(dispatch, "card_runs_triton", lambda _: "")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: True)
    assert choose_backend(AttentionRequest(torch.device("cuda"), dtype, width, sequences, with_lse)).name == wanted


def test_another_device_takes_torch_alone():
    name, why = attention_backend(torch.device("mps"))
    assert name == "sdpa" and "SDPA" in why


def document_by_document(calls, q, k, v, edges, scale, causal, **options):
    calls.append((edges.tolist(), causal, options))
    assert edges.dtype == torch.int32
    lengths = edges.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths)) + 1, lengths)
    plan = plan_attention(segment, torch.zeros_like(segment) if causal else segment)
    return attend_densely(q, k, v, plan, scale)


def version_2(calls):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        deterministic=False,
    ):  # fmt: skip
        options = {"longest": (max_seqlen_q, max_seqlen_k), "deterministic": deterministic}
        return document_by_document(calls, q, k, v, cu_seqlens_q, softmax_scale, causal, **options)[0]

    return flash_attn_varlen_func


def version_4(calls):
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False):
        return document_by_document(calls, q, k, v, cu_seqlens_q, softmax_scale, causal)  # with the log-sum-exp

    return flash_attn_varlen_func


@pytest.mark.parametrize(
    ("module", "version", "options"),
    [
        ("flash_attn", version_2, {"longest": (6, 6), "deterministic": True}),
        ("flash_attn_interface", version_2, {"longest": (6, 6), "deterministic": True}),
        ("flash_attn.cute", version_4, {}),
    ],
)
@pytest.mark.parametrize(("spans", "causal"), [([], True), ([(0, 6), (6, 10)], False)])
def test_every_version_of_flash_attn_is_called_as_it_declares_itself(
    monkeypatch, module, version, options, spans, causal
):
    calls: list = []
    fake = types.SimpleNamespace(flash_attn_varlen_func=version(calls))

    def find(name):
        if name != module:
            raise ImportError(name)
        return fake

    monkeypatch.setattr(flash.importlib, "import_module", find)
    uncached = flash.installed_flash_attention.__wrapped__
    monkeypatch.setattr(flash, "installed_flash_attention", uncached)
    plan = plan_attention(*row([6, 4], spans, 2))
    cos_sin = rope_cos_sin(torch.arange(12), 8, 10000.0, torch.float32)
    inputs = heads(12, 4, 1)
    out, _ = flash.attend_by_flash_attention(*inputs, plan, 0.3, cos_sin)
    torch.testing.assert_close(out, attention(*inputs, plan, 0.3, cos_sin), rtol=1e-5, atol=1e-5)
    assert calls == [([0, 6, 10], causal, options)]


def shaped(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q": shaped(5, 4, 8)}, "q_QNH has 5 queries and the plan 6"),
        ({"q": shaped(6, 32)}, r"q_QNH has shape \[6, 32\]"),
        ({"k": shaped(6, 8)}, r"k_TKH has shape \[6, 8\]"),
        ({"k": shaped(5, 1, 8)}, r"k_TKH has shape \[5, 1, 8\]"),
        ({"v": shaped(6, 1, 16)}, r"v_TKH \[6, 1, 16\]"),
        ({"k": shaped(6, 1, 4), "v": shaped(6, 1, 4)}, r"\[6, 1, 4\] .* both are \[6, K, 8\]"),
        ({"k": shaped(6, 3, 8), "v": shaped(6, 3, 8)}, "q_QNH has 4 heads and k_TKH 3"),
        ({"k": shaped(6, 0, 8), "v": shaped(6, 0, 8)}, "q_QNH has 4 heads and k_TKH 0"),
        ({"v": shaped(6, 1, 8, dtype=torch.float16)}, "v_TKH torch.float16"),
        ({name: shaped(6, 1, 8, dtype=torch.int32) for name in "qkv"}, "q_QNH is torch.int32"),
        ({"v": shaped(6, 1, 8, device="meta")}, "v_TKH on meta"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"cos_sin": rope_cos_sin(torch.arange(5), 8, 1e4, torch.float32)}, r"cos_sin has shape \[5, 1, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error_that_names_them(change, says):
    inputs = {
        "q": shaped(6, 4, 8),
        "k": shaped(6, 1, 8),
        "v": shaped(6, 1, 8),
        "scale": None,
        "cos_sin": None,
        **change,
    }
    with pytest.raises(ValueError, match=says):
        attention(*(inputs[x] for x in "qkv"), plan_attention(*row([6], [], 0)), inputs["scale"], inputs["cos_sin"])


@pytest.mark.parametrize("name", ["cpu", "sdpa"])
def test_inputs_that_are_not_contiguous_give_the_same(name):
    plan = plan_attention(*row([7, 4], [(2, 5)], 1))
    inputs = heads(12, 4, 2)
    mixed = [x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_() for x in inputs]
    out, wanted = (attention(*x, plan, backend=name) for x in (mixed, inputs))
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(out.shape).transpose(0, 1).contiguous().transpose(0, 1)
    for ours, theirs in zip(
        torch.autograd.grad(out, mixed, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)

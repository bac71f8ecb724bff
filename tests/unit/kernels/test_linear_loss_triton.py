"""The loss's Triton kernels equal float64 under Triton's interpreter, and compile for the GPUs they are meant for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BOUNDS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_gemini.kernels.losses import softmax_chunk_triton as kernels

ALIGNED = ("logits", "stride", "columns")  # as with a vocabulary that is a multiple of 16
floats = dict.fromkeys(("largest_C", "sum_C", "target_C", "of_softmax_C", "of_target_C"), "*fp32")
types = {"column_C": "*i64", "held_C": "*u8", "stride": "i32", "columns": "i32", "block": "constexpr", **floats}
for kernel in (kernels.statistics_kernel, kernels.gradient_kernel):
    for logits in ("*bf16", "*fp32"):
        signature = {"logits": logits, **{name: types[name] for name in kernel.arg_names[1:]}}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in ALIGNED}
        source = ASTSource(kernel, signature, constexprs={"block": kernels.BLOCK}, attrs=aligned)
        options = {"num_warps": kernels.WARPS}
        made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
        assert made.asm["cubin"] and "ld.global.v4" in made.asm["ptx"], "logits are not read 16 bytes at a time"
"""


def run(*arguments: str, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_kernels_equal_float64_under_the_interpreter():
    pytest.importorskip("triton")
    found = json.loads(run("-m", "tests.unit.kernels.loss_kernel_cases", TRITON_INTERPRET="1"))
    assert len(found) == 22
    for case, errors in found.items():
        for what, error in errors.items():
            bound = BOUNDS[case.split()[0]]
            if what in ("largest", "sum", "target", "in place"):
                bound = BOUNDS["float32"]
            assert error < bound, f"{case}: {what} is off by {error}"


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_without_a_gpu_and_read_16_bytes_at_a_time(capability):
    pytest.importorskip("triton")
    run("-c", COMPILE, capability)

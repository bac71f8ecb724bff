"""Our Triton attention: right under the interpreter, and its kernels compile for the cards they are made for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_gemini.kernels.attention.triton.backward import key_gradient_kernel, query_gradient_kernel
from megatron_gemini.kernels.attention.triton.forward import forward_kernel
from megatron_gemini.kernels.attention.triton.tiling import TILINGS, padded_width

INTERPRETED = Path(__file__).with_name("interpreted_attention.py")


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_the_kernels_equal_the_reference_under_the_interpreter(which):
    """In a process of its own, where TRITON_INTERPRET is set before Triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


KERNELS = {"forward": forward_kernel, "query_gradient": query_gradient_kernel, "key_gradient": key_gradient_kernel}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have on an A100 and an H100
CASES = [
    pytest.param(table, width, name, marks=() if (table, width) == ("hopper", 64) else pytest.mark.long)
    for table, by_width in TILINGS.items()
    for width in by_width
    for name in KERNELS
]


@pytest.mark.parametrize(("table", "width", "name"), CASES)
def test_a_kernel_compiles_for_its_card_and_fits_it(table, width, name):
    """Compiled to machine code without a card. Spilled registers: of 16-bit kernels, those that TILINGS admits."""
    tiling = getattr(TILINGS[table][width], name)
    capability = 90 if table == "hopper" else 80
    compiled, spilled = compile_for(KERNELS[name], tiling, width, capability, "fp32" if table == "float32" else "bf16")
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    if table != "float32":
        assert spilled <= (96 if (table, width, name) == ("hopper", 256, "key_gradient") else 0)
    assert ("wgmma" in compiled.asm["ptx"]) == (table == "hopper")


def compile_for(kernel, tiling, width, capability, dtype):
    """(the compiled kernel, bytes of registers that a thread spills)."""
    constants = {
        "K": 1,
        "G": 16,
        "H": width,
        "WIDTH": padded_width(width),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "TMA": capability >= 90,
        "SPLITS": 1,
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else kind_of(arg, dtype) for arg in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, arg in enumerate(kernel.arg_names)
        if arg.endswith(("_ptr", "_token", "_head"))
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return compiled, int(re.search(r"STACK:(\d+)", usage)[1])


def kind_of(argument, dtype):
    if argument in ("scale", "scale2"):
        return "fp32"
    if not argument.endswith("_ptr"):
        return "i32"
    if argument.startswith(("lse", "delta")):
        return "*fp32"
    return "*i32" if argument.startswith(("start", "reach", "first", "last", "order")) else f"*{dtype}"

"""Triton compiles every kernel for real GPUs, without one: what the interpreter accepts need not compile."""

from __future__ import annotations

import itertools
import os
import re

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from was_kernels.ops import score_mask, sparse_gemv_kernels
from was_kernels.ops.sparse_gemv import choose_tiling
from was_kernels.ops.triton_launch import interpreted

pytestmark = pytest.mark.slow

TYPES = {
    "x_ptr": "*{x}", "weight_ptr": "*{w}", "bias_ptr": "*{x}", "y_ptr": "*{x}", "norms_ptr": "*fp32",
    "dense_ptr": "*u8", "partial_ptr": "*fp32", "threshold": "fp32", "scales_ptr": "*fp16",
    "scale_ptr": "*fp32", "constant_ptr": "*fp32",
}  # fmt: skip
ALIGNED = {*TYPES, "d", "d_in", "d_out", "row_length", "stride_row", "stride_sequence", "stride_position"}
ALIGNED -= {"threshold"}


def ptx(kernel, constants, *, dtype="fp16", capability=90, aligned=True):
    if interpreted(kernel):
        pytest.skip("triton was imported under its interpreter")
    names = kernel.arg_names
    types = {
        name: kind.format(x=dtype, w="u8" if constants.get("BITS", 16) < 16 else dtype) for name, kind in TYPES.items()
    }
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if aligned and name in ALIGNED}
    attributes = {key: value for key, value in attributes.items() if names[key[0]] not in constants}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 1}).asm["ptx"]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def gemv_constants(rows, bits):
    cut = choose_tiling(rows, 4096, 4096, bits, 128, 132)
    blocks = {"STEPS": cut.steps, "BLOCK_OUT": cut.block_out, "BLOCK_IN": cut.block_in}
    return {"BITS": bits, "GROUP": 128 if bits < 16 else 1, **blocks}


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 16), ("bf16", 16), ("fp32", 32)])
@pytest.mark.parametrize("flags", [(False, True), (False, False), (True, False)], ids=["dense", "masked", "all"])
def test_gemv_compiles_with_predicated_16_byte_loads(dtype, bits, flags):
    keep = {"KEEP_ALL": flags[0], "HAS_DENSE": flags[1]}
    row = ptx(sparse_gemv_kernels.row_kernel, {**keep, **gemv_constants(1, bits)}, dtype=dtype)
    assert re.search(r"@%p\d+ ld\.global\.L1::evict_first\S*\.v4\.b32", row)
    constants = {**keep, **gemv_constants(4, bits), "UPCAST": False, "BLOCK_ROWS": 16}
    batch = ptx(sparse_gemv_kernels.batch_kernel, constants, dtype=dtype)
    assert re.search(r"@%p\d+ ld\.global\S*\.v4\.b32", batch)
    assert ("mma.sync" in batch) is (dtype != "fp32")


@pytest.mark.parametrize("capability", [80, 90])
def test_odd_shapes_compile(capability):
    odd = {"capability": capability, "aligned": False}
    keep = {"KEEP_ALL": False, "HAS_DENSE": True}
    assert ptx(sparse_gemv_kernels.row_kernel, {**keep, **gemv_constants(1, 16), "d_out": 1}, **odd)
    constants = {**keep, **gemv_constants(4, 16), "UPCAST": False, "BLOCK_ROWS": 16, "d_in": 1}
    assert ptx(sparse_gemv_kernels.batch_kernel, constants, **odd)
    for bias, corrected, dense in itertools.product((False, True), repeat=3):
        constants = {"HAS_BIAS": bias, "CORRECTED": corrected, "HAS_DENSE": dense, "SPLITS": 11, "BLOCK": 256}
        assert ptx(sparse_gemv_kernels.reduce_kernel, constants, **odd)
        ones = {"n_rows": 1, "d_out": 1}
        assert ptx(sparse_gemv_kernels.reduce_kernel, {**constants, "SPLITS": 1, **ones}, **odd)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_score_mask_compiles(dtype):
    kernel = score_mask._score_mask_kernel
    blocks = {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 1024}
    for dense in (False, True):
        assert ".v4.b32" in ptx(kernel, {"HAS_DENSE": dense, **blocks}, dtype=dtype)
    ones = dict.fromkeys(("n_rows", "positions", "d", "stride_sequence", "stride_position"), 1)
    assert ptx(kernel, {"HAS_DENSE": True, **blocks, **ones}, dtype=dtype, aligned=False)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("aligned", [True, False])
def test_gemv_of_rounded_weights_compiles(bits, capability, aligned):
    options = {"capability": capability, "aligned": aligned}
    constants = {"KEEP_ALL": False, "HAS_DENSE": True, **gemv_constants(1, bits)}
    row = ptx(sparse_gemv_kernels.row_kernel, constants, **options)
    if aligned:  # bytes of several weights in one load
        assert re.search(r"@%p\d+ ld\.global\.L1::evict_first\S*\.(v\d\.)?b32", row)
    constants |= {**gemv_constants(4, bits), "UPCAST": True, "BLOCK_ROWS": 16}
    assert "fma.rn.f32" in ptx(sparse_gemv_kernels.batch_kernel, constants, **options)

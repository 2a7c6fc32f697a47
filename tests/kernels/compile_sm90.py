"""Compiles every configuration of the block-size table for sm_90, with no GPU: one line of JSON per configuration.

    python tests/kernels/compile_sm90.py

Each line has the instructions found in the PTX (wgmma, bulk tensor copies), registers, stack and local memory as
cuobjdump reports them for the cubin (a spill takes stack), and the shared memory of a launch in bytes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pregate.kernels import triton_decode, triton_ffn, triton_segments
from pregate.kernels.block_sizes import BlockSizes, BlockTable
from pregate.kernels.triton_path import FP32_SIZES

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
BUFFERS = ("x_ptr", "h_ptr", "y_ptr", "out_ptr", "w", "w_ptr", "scale_ptr")
#: Arguments that are multiples of 16 in every model we serve: the compiler then emits 16-byte loads.
DIVISIBLE = {"D", "M"}
#: What 8-bit weights are called in a signature.
QUANTISED = ("i8", "fp8e4nv")


def source(kernel: Any, element: str, constants: dict[str, Any], weights: str) -> ASTSource:
    """The kernel with pointers to `element`, int32 index arrays, fp32 scales, and `weights` as given."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("w", "w_ptr"):
            signature[name] = weights
        elif name in BUFFERS[:4]:
            signature[name] = f"*{element}"
        elif name in ("scale_ptr", "row_weight_ptr", "weights_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32"
        if name in (*BUFFERS, *DIVISIBLE):
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def tiled(kernel: str, block_m: int, sizes: BlockSizes, *, tma: bool, quant: str = "", atomic: bool = False):
    """The source of kernel A or B."""
    constants: dict[str, Any] = {
        "BLOCK_M": block_m,
        "BLOCK_N": sizes.block_n,
        "BLOCK_K": sizes.block_k,
        "SWAP": sizes.swap,
        "TMA": tma,
        "SCALED": bool(quant),
    }
    element = "fp32" if sizes is FP32_SIZES else "bf16"
    held = quant or element
    weights = f"tensordesc<{held}[{sizes.block_n},{sizes.block_k}]>" if tma else f"*{held}"
    constants |= {} if quant else {"scale_ptr": None}
    if kernel == "gate_up":
        constants |= {"ACT": "silu", "WEIGHTED": False, "row_weight_ptr": None}
        return source(triton_ffn.gate_up_kernel, element, constants, weights)
    return source(triton_ffn.down_kernel, element, {**constants, "ATOMIC": atomic}, weights)


def decode(kernel: str, sizes: BlockSizes, *, quant: str = ""):
    """The source of one half of kernel C."""
    constants: dict[str, Any] = {
        "NUM_SHARED": 1,
        "BLOCK_K": sizes.block_k,
        "SCALED": bool(quant),
        "PADDED": triton_decode.PADDED_TOKENS,
    }
    constants |= {} if quant else {"scale_ptr": None}
    weights = f"*{quant or 'bf16'}"
    if kernel == "decode_gate_up":
        constants |= {"ACT": "silu", "WEIGHTED": False, "weights_ptr": None, "HALF_N": triton_decode.HALF}
        return source(triton_decode.decode_gate_up_kernel, "bf16", constants, weights)
    return source(triton_decode.decode_down_kernel, "bf16", {**constants, "BLOCK_N": sizes.block_n}, weights)


def configurations() -> Iterator[tuple[str, ASTSource, BlockSizes, bool]]:
    """Name, source, sizes and whether it must use wgmma, for the whole table and for what the table does not say."""
    table = BlockTable.load("")
    for kernel in ("gate_up", "down"):
        for block_m, sizes in table.by_rows[kernel].items():
            yield f"{kernel} {block_m} tma", tiled(kernel, block_m, sizes, tma=True), sizes, True
        for block_m in (16, 128):
            sizes = table.sizes(kernel, block_m)
            yield f"{kernel} {block_m} pointers", tiled(kernel, block_m, sizes, tma=False), sizes, True
        sizes = table.sizes(kernel, 64)
        for quant in QUANTISED:
            yield f"{kernel} 64 tma {quant}", tiled(kernel, 64, sizes, tma=True, quant=quant), sizes, True
        yield f"{kernel} 128 fp32", tiled(kernel, 128, FP32_SIZES, tma=True), FP32_SIZES, False
    sizes = table.sizes("down", 64)
    yield "down 64 atomic", tiled("down", 64, sizes, tma=True, atomic=True), sizes, True
    for kernel in ("decode_gate_up", "decode_down"):
        sizes = table.sizes(kernel, 16)
        yield kernel, decode(kernel, sizes), sizes, True
        for quant in QUANTISED:
            yield f"{kernel} {quant}", decode(kernel, sizes, quant=quant), sizes, True
    small = BlockSizes(block_n=1, block_k=1, num_warps=4, num_stages=2)
    yield "sum", source(triton_ffn.sum_kernel, "bf16", {"BLOCK_D": 1024}, ""), small, False
    constants = {"NUM_SHARED": 1, "BLOCK_M": 64, "BLOCK": 256, "PADDED_E": 16}
    yield "segments", source(triton_segments.segments_kernel, "bf16", constants, ""), small, False


def inspect(compiled: Any) -> dict[str, Any]:
    """What the compiled kernel is made of."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "wgmma": "wgmma.mma_async" in ptx,
        "bulk_copy": "cp.async.bulk.tensor" in ptx,
        "registers": found["reg"],
        "stack_bytes": found["stack"],
        "local_bytes": found["local"],
        "shared_bytes": compiled.metadata.shared,
    }


def main() -> None:
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, ast_source, sizes, needs_wgmma in configurations():
        if only not in name:
            continue
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
        compiled = triton.compile(ast_source, target=TARGET, options=options)
        print(json.dumps({"name": name, "needs_wgmma": needs_wgmma, **inspect(compiled)}), flush=True)


if __name__ == "__main__":
    main()

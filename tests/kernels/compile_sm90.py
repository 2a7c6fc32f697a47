"""Compiles every configuration of the block-size table for sm_90, with no GPU: one line of JSON per configuration.

Beside them: what a smaller card without a row of its own would get, for sm_86.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pregate.kernels.triton import decode as triton_decode
from pregate.kernels.triton import segments as triton_segments
from pregate.kernels.triton import tiled as triton_tiled
from pregate.kernels.triton.block_sizes import BlockSizes, BlockTable, shared_bytes
from pregate.kernels.triton.ffn import FP32_SIZES

SM_90 = GPUTarget("cuda", 90, 32)
SM_86 = GPUTarget("cuda", 86, 32)
#: What one block may have on a card of capability 8.6: 99 KiB.
MAX_SHARED_SM_86 = 99 * 1024
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


@dataclass(frozen=True)
class Config:
    """One compilation. `quant` names 8-bit weights; `tma` is for tiled kernels, `act` and `weighted` for gate-up."""

    kernel: str
    block_m: int
    sizes: BlockSizes
    element: str = "bf16"
    act: str = "silu"
    weighted: bool = False
    tma: bool = True
    quant: str = ""
    target: GPUTarget = SM_90

    @property
    def name(self) -> str:
        up = self.kernel.endswith("gate_up")
        marks = {"sm_86": self.target != SM_90, "tma": self.has_tma}
        marks |= {self.act: up, "weighted": up and self.weighted, self.quant: bool(self.quant)}
        return " ".join([self.kernel, str(self.block_m), self.element, *(mark for mark in marks if marks[mark])])

    @property
    def is_decode(self) -> bool:
        return self.kernel.startswith("decode")

    @property
    def has_tma(self) -> bool:
        return self.tma and not self.is_decode

    @property
    def needs_wgmma(self) -> bool:
        return self.element != "fp32" and self.target == SM_90

    def source(self) -> ASTSource:
        constants = self._decode() if self.is_decode else self._tiled()
        constants |= {"SCALED": bool(self.quant)} | ({} if self.quant else {"scale_ptr": None})
        if self.kernel.endswith("gate_up"):
            unused = {} if self.weighted else {"weights_ptr" if self.is_decode else "row_weight_ptr": None}
            constants |= {"ACT": self.act, "WEIGHTED": self.weighted, **unused}
        held = self.quant or self.element
        block = f"[{self.sizes.block_n},{self.sizes.block_k}]"
        weights = f"tensordesc<{held}{block}>" if self.has_tma else f"*{held}"
        return source(KERNELS[self.kernel], self.element, constants, weights)

    def _tiled(self) -> dict[str, Any]:
        sizes = self.sizes
        shape = {"BLOCK_M": self.block_m, "BLOCK_N": sizes.block_n, "BLOCK_K": sizes.block_k}
        return {**shape, "SWAP": sizes.swap, "TMA": self.tma}

    def _decode(self) -> dict[str, Any]:
        block = {"HALF_N": triton_decode.HALF} if self.kernel.endswith("up") else {"BLOCK_N": self.sizes.block_n}
        return {"NUM_SHARED": 1, "BLOCK_K": self.sizes.block_k, "PADDED": triton_decode.PADDED_TOKENS, **block}


KERNELS = {
    "gate_up": triton_tiled.gate_up_kernel,
    "down": triton_tiled.down_kernel,
    "decode_gate_up": triton_decode.decode_gate_up_kernel,
    "decode_down": triton_decode.decode_down_kernel,
}


def configurations() -> Iterator[Config]:
    """The whole table in bf16 and fp16, with every activation and routing weights, and what the table does not say."""
    table = BlockTable.load("")
    for kernel, rows in table.by_rows.items():
        for block_m, sizes in rows.items():
            plain = Config(kernel, block_m, sizes)
            yield plain
            if not kernel.endswith("gate_up"):
                yield replace(plain, element="fp16")
                continue
            yield replace(plain, element="fp16", act="gelu", weighted=True)
            yield replace(plain, act="gelu_pytorch_tanh", weighted=True)
        for block_m in sorted({16, 128} & set(rows)) if not plain.is_decode else ():
            yield Config(kernel, block_m, table.sizes(kernel, block_m), tma=False)
        ends = {min(rows), max(rows)}
        yield from (Config(kernel, m, rows[m], quant=quant) for m in sorted(ends) for quant in QUANTISED)
        yield from (Config(kernel, m, FP32_SIZES, element="fp32") for m in rows)
    yield Config("gate_up", 128, FP32_SIZES, element="fp32", act="gelu", weighted=True)
    yield from cut_configurations(table)


def cut_configurations(table: BlockTable) -> Iterator[Config]:
    """What a device without a row gets where the default row does not fit, for a card of capability 8.6."""
    cut = BlockTable.load("a card", max_shared_bytes=MAX_SHARED_SM_86)
    for kernel, rows in cut.by_rows.items():
        for block_m, sizes in rows.items():
            if sizes != table.sizes(kernel, block_m):
                yield Config(kernel, block_m, sizes, element="fp16", act="gelu", weighted=True, tma=False, target=SM_86)


def small_kernels() -> Iterator[tuple[str, ASTSource]]:
    """The kernels that the table says nothing of."""
    yield "sum", source(triton_tiled.sum_kernel, "bf16", {"BLOCK_D": 1024}, "")
    constants = {"NUM_SHARED": 1, "BLOCK_M": 64, "BLOCK": 256, "PADDED_E": 16}
    yield "segments", source(triton_segments.segments_kernel, "bf16", constants, "")


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
    for config in configurations():
        if only not in config.name:
            continue
        sizes = config.sizes
        options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
        compiled = triton.compile(config.source(), target=config.target, options=options)
        said = {
            "kernel": config.kernel,
            "block_m": config.block_m,
            "element": config.element,
            "act": config.act,
            "weighted": config.weighted,
            "arch": config.target.arch,
            "needs_wgmma": config.needs_wgmma,
            "needs_bulk_copy": config.has_tma,
            "estimated_bytes": shared_bytes(config.kernel, config.block_m, sizes),
        }
        print(json.dumps({"name": config.name, **said, **inspect(compiled)}), flush=True)
    for name, ast_source in small_kernels():
        if only in name:
            compiled = triton.compile(ast_source, target=SM_90, options={"num_warps": 4, "num_stages": 2})
            print(json.dumps({"name": name, "kernel": name, **inspect(compiled)}), flush=True)


if __name__ == "__main__":
    main()

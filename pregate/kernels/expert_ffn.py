"""The one fast entry point of the expert FFN. Which implementation runs is chosen once, at start, and logged."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.cpu import ffn as cpu_ffn
from pregate.kernels.cpu import packed as cpu_packed
from pregate.kernels.cpu.ffn import GroupedFFN, LoopFFN
from pregate.kernels.cpu.packed import Int8FFN, PackedFFN
from pregate.kernels.cpu.stored import StoredFFN

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
#: What `triton_ffn.ACTIVATIONS` has; kept here because importing that needs Triton.
TRITON_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh")
#: Smaller matrices gain less from packing than each packed product costs to call (docs/measurements.md).
MIN_PACKED_VALUES = 65536
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The first CUDA devices whose instructions know float8_e4m3fn.
MIN_FP8_CAPABILITY = (8, 9)
_CPU = {ffn.name: ffn for ffn in (PackedFFN, GroupedFFN, LoopFFN, Int8FFN)}
#: What Triton's implementations hold weights in; None is the compute dtype.
_TRITON = {"triton": None, "triton-int8": torch.int8, "triton-fp8": torch.float8_e4m3fn}
#: By name; "auto" chooses among those that compute without loss (see `_best`).
IMPLEMENTATIONS = ("auto", *_CPU, StoredFFN.name, *_TRITON)

_log = get_logger(__name__)


def choose(
    implementation: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    act: str,
    widths: Iterable[int],
    fits_fp16: Callable[[], bool] = lambda: False,
    passing: bool = False,
    stored: torch.dtype | None = None,
) -> ExpertFFN:
    """Return the implementation for this machine; `widths` are all row lengths (hidden, expert) it will meet,
    `fits_fp16` says whether fp16 holds the weights as they are (`cpu.packed.fits_fp16`), asked only where that matters,
    `passing` that experts come and go (measured with a quarter and three quarters held: docs/measurements.md), `stored`
    in which dtype the checkpoint has them, None where there is none or several.

    Raises UserError when the named implementation is unknown or cannot run here, and for a dtype that this CPU has no
    instructions for; only "auto" chooses.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError.of("--expert-ffn", implementation, f"unknown; allowed: {', '.join(IMPLEMENTATIONS)}")
    if device.type not in ("cpu", "cuda"):
        raise UserError.of("--device", device, "no expert FFN for it; allowed: cpu, cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError.of("--device", device, "torch finds no CUDA device; allowed here: cpu")
    if device.type == "cpu":
        _refuse_slow(dtype)
    widths = tuple(widths)
    if implementation == "auto":
        name, reason = _best(device, dtype, act, widths, fits_fp16, passing, stored)
    else:
        name, reason = implementation, "asked for by name"
        if hindrance := why_not(name, device, dtype, act, widths, stored):
            allowed = [n for n in IMPLEMENTATIONS[1:] if not why_not(n, device, dtype, act, widths, stored)]
            raise UserError.of(
                "--expert-ffn", name, f"not possible here: {hindrance}; allowed: {', '.join(['auto', *allowed])}"
            )
    if name in _TRITON:
        from pregate.kernels.triton.ffn import TritonFFN

        ffn: ExpertFFN = TritonFFN(act, device, dtype, weight_dtype=_TRITON[name])
    elif name == StoredFFN.name:
        assert stored is not None
        ffn = StoredFFN(act, stored)
    else:
        ffn = _CPU[name](act, dtype)
    _log.info("expert FFN on %s in %s: %s (%s)", device, dtype_name(dtype), ffn.name, reason)
    return ffn


def layer_segments(
    ffn: ExpertFFN,
    sizes: Mapping[int, tuple[int, int]],
    ids_TLK: torch.Tensor,
    weights_TLK: torch.Tensor | None = None,
) -> dict[int, Any]:
    """Return the segments of a step's layers in `sizes`, which says how many routed and shared units each has.

    `ids_TLK` and `weights_TLK` are of all layers, as for `ExpertFFN.segments`. Layers of equal sizes share one call.
    """
    found: dict[int, Any] = {}
    for num_routed, num_shared in dict.fromkeys(sizes.values()):
        layers = [layer for layer, other in sizes.items() if other == (num_routed, num_shared)]
        here = slice(None) if layers == list(range(ids_TLK.shape[1])) else layers  # a slice copies nothing
        weights = None if weights_TLK is None else weights_TLK[:, here]
        built = ffn.segments(ids_TLK[:, here], num_routed, num_shared, weights)
        found |= {layer: built.layer(place) for place, layer in enumerate(layers)}
    return found


def why_not(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    act: str,
    widths: tuple[int, ...],
    stored: torch.dtype | None = None,
) -> str:
    """Return why implementation `name` cannot run here; empty if it can."""
    if name in _TRITON:
        return _why_not_triton(name, device, dtype, act)
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if name == StoredFFN.name:
        return StoredFFN.why_not_stored(dtype, act, widths, stored)
    return _CPU[name].why_not(dtype, widths)


def value_bytes(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    act: str,
    widths: tuple[int, ...],
    stored: torch.dtype | None,
    fits_fp16: Callable[[], bool],
) -> tuple[int, int]:
    """Return the bytes that each number of an expert takes: where experts come and go, and where all stay. The
    implementation is `name`; the others as for `choose`."""
    as_stored = not why_not(StoredFFN.name, device, dtype, act, widths, stored)
    coming = 2 if as_stored and name in ("auto", StoredFFN.name) else dtype.itemsize
    packs = cpu_packed.packs_to_fp16(name, device, dtype) and fits_fp16()
    return coming, 2 if packs else coming if name == StoredFFN.name else dtype.itemsize


def _best(
    device: torch.device,
    dtype: torch.dtype,
    act: str,
    widths: tuple[int, ...],
    fits_fp16: Callable[[], bool],
    passing: bool,
    stored: torch.dtype | None,
) -> tuple[str, str]:
    """Return the implementation that "auto" means, and why."""
    if device.type == "cuda":
        if hindrance := why_not("triton", device, dtype, act, widths):
            raise UserError.of("--device", device, f"no expert FFN for it: {hindrance}; allowed here: cpu")
        return "triton", "the kernels for CUDA devices"
    if passing:
        come_and_go = "experts come and go: to pack one takes longer than packing saves while it stays"
        hindrance = why_not(StoredFFN.name, device, dtype, act, widths, stored)
        return ("loop", f"{come_and_go}; not stored: {hindrance}") if hindrance else (StoredFFN.name, come_and_go)
    if dtype == torch.float32 and not cpu_packed.why_no_fp16() and fits_fp16():
        return "packed", "fp16 holds the weights: half the bytes to read"
    unpacked = "" if cpu_ffn.has_avx512() else "without AVX-512 packed weights pay only from 2 to 16 rows"
    if min(widths) * max(widths) < MIN_PACKED_VALUES:
        unpacked = unpacked or "experts this small do not gain from packed weights"
    unpacked = unpacked or PackedFFN.why_not(dtype, widths)
    if not unpacked:
        return "packed", "AVX-512: packed weights are fastest at every batch size"
    ungrouped = GroupedFFN.why_not(dtype, widths)
    return ("loop", f"{unpacked}; {ungrouped}") if ungrouped else ("grouped", unpacked)


def _why_not_triton(name: str, device: torch.device, dtype: torch.dtype, act: str) -> str:
    on_cuda = device.type == "cuda"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'pregate[gpu]')"
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's kernels need a CUDA device (or TRITON_INTERPRET=1, for tests)"
    if act not in TRITON_ACTIVATIONS:
        return f"Triton's kernels have no {act}; they have {', '.join(TRITON_ACTIVATIONS)}"
    if dtype not in TRITON_DTYPES:
        return f"Triton's kernels do not compute in {dtype}"
    if not on_cuda:
        return "the bfloat16 product of Triton's interpreter is wrong" if dtype == torch.bfloat16 else ""
    lacks_fp8 = name == "triton-fp8" and torch.cuda.get_device_capability(device) < MIN_FP8_CAPABILITY
    return "this CUDA device has no float8 instructions (they begin with capability 8.9)" if lacks_fp8 else ""


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in. "auto" is float32 on a CPU, bfloat16 on CUDA, whatever the checkpoint holds.

    Raises UserError for an unknown name and for one this machine has no instructions for.
    """
    if name not in COMPUTE_DTYPES:
        raise UserError.of("--dtype", name, f"unknown; allowed: {', '.join(COMPUTE_DTYPES)}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name)
    if device.type == "cpu":
        _refuse_slow(dtype)
    return dtype


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what to compute weights of `dtype` in: float32 on a CPU without native instructions for it."""
    return torch.float32 if device.type == "cpu" and cpu_ffn.why_not_dtype(dtype) else dtype


def _refuse_slow(dtype: torch.dtype) -> None:
    if hindrance := cpu_ffn.why_not_dtype(dtype):
        raise UserError.of("--dtype", dtype_name(dtype), f"{hindrance}; allowed here: auto, float32")

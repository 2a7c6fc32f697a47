"""The one fast entry point of the expert FFN. Which implementation runs is chosen once, at start, and logged."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.kernels.cpu import ffn as cpu
from pregate.kernels.cpu import packed as cpu_packed
from pregate.kernels.segments import Segment, Segments
from pregate.kernels.units import GroupRows, LayerUnits

#: By name; "auto" chooses among those that compute without loss (see `_best`).
IMPLEMENTATIONS = ("auto", "packed", "grouped", "loop", "int8", "triton", "triton-int8", "triton-fp8", "triton-atomic")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
#: What `triton_path.ACTIVATIONS` has; kept here because importing that needs Triton.
TRITON_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh")
#: Experts with fewer values in a matrix gain less from packing than each packed product costs to call (measured against
#: `grouped`: 49,152 are 0.8 times as fast at 1 to 4 tokens and 1.2 at 64; 90,112 are 0.9 and 1.2 to 1.5).
MIN_PACKED_VALUES = 65536
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The first CUDA devices whose instructions know float8_e4m3fn.
MIN_FP8_CAPABILITY = (8, 9)
_TRITON: dict[str, dict[str, Any]] = {
    "triton": {},
    "triton-int8": {"weight_dtype": torch.int8},
    "triton-fp8": {"weight_dtype": torch.float8_e4m3fn},
    "triton-atomic": {"atomic": True},
}

_log = get_logger(__name__)


class Layout(Protocol):
    """How an implementation holds experts in slots. Weights are opaque to everyone else."""

    def allocate(self, num_slots: int, width: int, hidden: int) -> Any:
        """Return slots for experts `width` wide; they have `num_slots` and `slot_bytes`."""
        ...

    def put(self, weights: Any, slot: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Write one expert, `gate_up` [2M, D] and `down` [D, M] in any dtype, into `slot`."""
        ...

    def move(self, old: Any, old_slot: int, new: Any, new_slot: int) -> None:
        """Take over a slot of other weights of the same widths as it is held."""
        ...


class ExpertFFN(Protocol):
    """Runs experts. Shape letters: T tokens, N rows, P (row, unit) pairs, S slots, D hidden width, M expert width.

    `shared_in_segments`: whether `layer` wants segments that hold the shared units too. `compiles`: whether
    kernels are compiled when first called (`warm_up.py`). `why_no_layers`: why serving must not have `layer` in place
    of `dense`, `pairs` and a sum in fixed order; empty where it may.
    """

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def shared_in_segments(self) -> bool: ...

    @property
    def compiles(self) -> bool: ...

    @property
    def why_no_layers(self) -> str: ...

    def block_m(self, num_rows: int, num_units: int) -> int:
        """Return the rows per tile that segments should be built with, for rows over units of a layer (means)."""
        ...

    def stack(self, gate_up_SMD: torch.Tensor, down_SDM: torch.Tensor) -> Any:
        """Return experts `gate_up_SMD` [S, 2M, D] (gate rows first) and `down_SDM` [S, D, M] in this layout."""
        ...

    def units(
        self,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
        num_shared: int,
        gate_up_RMD: torch.Tensor,
        down_RDM: torch.Tensor,
    ) -> LayerUnits:
        """Return a whole layer for `layer`: its shared expert (one FFN, `num_shared` units wide) and routed ones."""
        ...

    def segments(
        self, ids_TLK: torch.Tensor, num_routed: int, num_shared: int, weights_TLK: torch.Tensor | None = None
    ) -> Segments:
        """Return what `layer` reads, for all these layers at once, on the device; ids of any integer type, -1 for none.

        Nothing waits for the device where `ids_TLK` is on the host or already there. ValueError for ids on the host
        that are out of range.
        """
        ...

    def prepare(self, groups: Sequence[GroupRows]) -> list[GroupRows]:
        """Return groups with all that `pairs` makes of the indexes, made for all at once (one copy to a device).

        PregateError for a unit without a slot. A group need not be prepared; `pairs` then does it.
        """
        ...

    def pairs(self, x_ND: torch.Tensor, rows: GroupRows, weights: Any) -> torch.Tensor:
        """Return [P, D], one row per pair in order: what a host answers. PregateError for a unit without a slot."""
        ...

    def dense(self, x_TD: torch.Tensor, weights: Any) -> torch.Tensor:
        """Return [T, D]: every row through the expert in slot 0 (a shared expert in a stack of its own)."""
        ...

    def layer(self, x_TD: torch.Tensor, segment: Segment, units: LayerUnits) -> torch.Tensor:
        """Return [T, D], the sum over each token's units. PregateError for a unit without a slot."""
        ...


def choose(
    implementation: str, device: torch.device, dtype: torch.dtype, *, act: str, widths: Iterable[int]
) -> ExpertFFN:
    """Return the implementation for this machine; `widths` are all row lengths (hidden, expert) it will meet.

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
        name, reason = _best(device, dtype, act, widths)
    else:
        name, reason = implementation, "asked for by name"
        if hindrance := why_not(name, device, dtype, act, widths):
            allowed = [n for n in IMPLEMENTATIONS[1:] if not why_not(n, device, dtype, act, widths)]
            raise UserError.of(
                "--expert-ffn", name, f"not possible here: {hindrance}; allowed: {', '.join(['auto', *allowed])}"
            )
    ffn = _make(name, device, dtype, act)
    _log.info("expert FFN on %s in %s: %s (%s)", device, dtype_name(dtype), ffn.name, reason)
    return ffn


def layer_segments(
    ffn: ExpertFFN,
    sizes: Mapping[int, tuple[int, int]],
    ids_TLK: torch.Tensor,
    weights_TLK: torch.Tensor | None = None,
) -> dict[int, Segment]:
    """Return the segments of a step's layers in `sizes`, which says how many routed and shared units each has.

    `ids_TLK` and `weights_TLK` are of all layers, as for `ExpertFFN.segments`. Layers of equal sizes share one call.
    """
    found: dict[int, Segment] = {}
    for num_routed, num_shared in dict.fromkeys(sizes.values()):
        layers = [layer for layer, other in sizes.items() if other == (num_routed, num_shared)]
        here = slice(None) if layers == list(range(ids_TLK.shape[1])) else layers  # a slice copies nothing
        weights = None if weights_TLK is None else weights_TLK[:, here]
        built = ffn.segments(ids_TLK[:, here], num_routed, num_shared, weights)
        found |= {layer: built.layer(place) for place, layer in enumerate(layers)}
    return found


def why_not(name: str, device: torch.device, dtype: torch.dtype, act: str, widths: tuple[int, ...]) -> str:
    """Return why implementation `name` cannot run here; empty if it can."""
    if name in _TRITON:
        return _why_not_triton(name, device, dtype, act)
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    checks: dict[str, Callable[[], str]] = {
        "packed": lambda: cpu_packed.why_not_packed(dtype),
        "grouped": lambda: cpu.why_not_grouped(widths, dtype),
        "loop": lambda: "",
        "int8": lambda: cpu_packed.why_not_int8(dtype),
    }
    return checks[name]()


def _best(device: torch.device, dtype: torch.dtype, act: str, widths: tuple[int, ...]) -> tuple[str, str]:
    """Return the implementation that "auto" means, and why."""
    if device.type == "cuda":
        if hindrance := why_not("triton", device, dtype, act, widths):
            raise UserError.of("--device", device, f"no expert FFN for it: {hindrance}; allowed here: cpu")
        return "triton", "the kernels for CUDA devices"
    unpacked = "" if cpu.has_avx512() else "without AVX-512 packed weights pay only from 2 to 16 rows"
    if min(widths) * max(widths) < MIN_PACKED_VALUES:
        unpacked = unpacked or "experts this small do not gain from packed weights"
    unpacked = unpacked or why_not("packed", device, dtype, act, widths)
    if not unpacked:
        return "packed", "AVX-512: packed weights are fastest at every batch size"
    ungrouped = why_not("grouped", device, dtype, act, widths)
    return ("loop", f"{unpacked}; {ungrouped}") if ungrouped else ("grouped", unpacked)


def _make(name: str, device: torch.device, dtype: torch.dtype, act: str) -> ExpertFFN:
    if name in _TRITON:
        from pregate.kernels.triton.path import TritonFFN

        return TritonFFN(act, device, dtype, **_TRITON[name])
    makers = {
        "packed": cpu_packed.PackedFFN,
        "grouped": cpu.GroupedFFN,
        "loop": cpu.LoopFFN,
        "int8": cpu_packed.Int8FFN,
    }
    return makers[name](act, dtype)


def _why_not_triton(name: str, device: torch.device, dtype: torch.dtype, act: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'pregate[gpu]')"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's kernels need a CUDA device (or TRITON_INTERPRET=1, for tests)"
    if act not in TRITON_ACTIVATIONS:
        return f"Triton's kernels have no {act}; they have {', '.join(TRITON_ACTIVATIONS)}"
    return _why_not_triton_dtype(name, device, dtype)


def _why_not_triton_dtype(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if dtype not in TRITON_DTYPES:
        return f"Triton's kernels do not compute in {dtype}"
    if device.type != "cuda":
        return "the bfloat16 product of Triton's interpreter is wrong" if dtype == torch.bfloat16 else ""
    if name == "triton-fp8" and torch.cuda.get_device_capability(device) < MIN_FP8_CAPABILITY:
        return "this CUDA device has no float8 instructions (they begin with capability 8.9)"
    return ""


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
    return torch.float32 if device.type == "cpu" and cpu.why_not_dtype(dtype) else dtype


def _refuse_slow(dtype: torch.dtype) -> None:
    if hindrance := cpu.why_not_dtype(dtype):
        raise UserError.of("--dtype", dtype_name(dtype), f"{hindrance}; allowed here: auto, float32")

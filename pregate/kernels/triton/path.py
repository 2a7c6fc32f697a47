"""`TritonFFN`: the expert FFN through the Triton kernels; launches, buffers, and which kernel serves which batch.

Shape letters: T tokens, N rows of a group, P rows (token, unit), U units of a group, D hidden width, M expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from pregate.kernels import segments
from pregate.kernels.segments import Segment, Segments
from pregate.kernels.triton import decode as triton_decode
from pregate.kernels.triton import ffn as triton_ffn
from pregate.kernels.triton import segments as triton_segments
from pregate.kernels.triton.block_sizes import BlockSizes, BlockTable, block_m_for
from pregate.kernels.units import GroupRows, LayerUnits, check_present
from pregate.kernels.weights import LayerWeights, PaddedLayout, QuantisedLayout, split_shared

#: fp32 has no tensor-core product of full precision: small blocks that fit the registers, whatever the table says.
FP32_SIZES = BlockSizes(block_n=32, block_k=16, num_warps=8, num_stages=2)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
SUM_BLOCK_D = 1024
#: Programs of a persistent grid where there is no device to ask (the interpreter).
NUM_SMS_INTERPRETED = 3


@dataclass(frozen=True)
class _Work:
    """Rows of one launch pair, on the device: see `segments.Segment`."""

    block_m: int
    num_rows: int
    max_tiles: int
    row_token: torch.Tensor
    row_weight: torch.Tensor | None
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    unit_slot: torch.Tensor


class TritonFFN:
    """Kernels A and B over sorted rows; C for a whole layer of at most 8 tokens.

    `weight_dtype` int8 or float8_e4m3fn holds 8-bit weights with a scale per row. `atomic` adds a layer's rows into
    its output with fp32 atomics instead of the deterministic store and sum: a launch less and no [P, D] buffer, but
    the order of a sum, and so its last bits, vary from run to run. It is there to be measured beside the other
    (`pregate bench kernels --expert-ffn triton-atomic`); serving, which promises one order, does not run layers by it.
    `tma` None uses it where the device has it.
    """

    shared_in_segments = True
    compiles = True

    def __init__(
        self,
        act: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        weight_dtype: torch.dtype | None = None,
        atomic: bool = False,
        tma: bool | None = None,
    ) -> None:
        self.name = f"triton-{_short(weight_dtype)}" if weight_dtype else "triton-atomic" if atomic else "triton"
        self._act, self._dtype, self._atomic = ACTIVATIONS[act], dtype, atomic
        self._device = device
        self._scaled = weight_dtype is not None
        self.why_no_layers = "it would round the shared experts too" if self._scaled else ""
        if atomic:
            self.why_no_layers = "it adds a token's experts in any order"
        layout = PaddedLayout if weight_dtype is None else QuantisedLayout
        self.layout = layout(weight_dtype or dtype, device)
        cuda = device.type == "cuda"
        properties = torch.cuda.get_device_properties(device) if cuda else None
        self._num_sms = properties.multi_processor_count if properties else NUM_SMS_INTERPRETED
        self._tma = (properties is not None and properties.major >= 9) if tma is None else tma
        self._dense: Segment | None = None
        # Slot 0, and where it was copied to: a copy in every layer would be a wait in every layer.
        self._dense_slots = np.zeros(1, dtype=np.int32)
        self._dense_slots_on: dict[torch.device, torch.Tensor] = {}
        name = properties.name if properties else ""
        self.table = BlockTable.load(name, max_shared_bytes=_max_shared_bytes(device) if cuda else None)

    def block_m(self, num_rows: int, num_units: int) -> int:
        """Rows per tile that segments for this implementation should be built with."""
        return block_m_for(num_rows, num_units)

    def stack(self, gate_up_SMD: torch.Tensor, down_SDM: torch.Tensor) -> LayerWeights:
        """Return experts in the kernels' layout."""
        return self.layout.stack(gate_up_SMD, down_SDM)

    def units(
        self,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
        num_shared: int,
        gate_up_RMD: torch.Tensor,
        down_RDM: torch.Tensor,
    ) -> LayerUnits:
        """Return a layer in one stack: the shared expert cut into units of the routed width, then the routed ones."""
        slices = split_shared(*shared, num_shared) if shared is not None else []
        num_routed, hidden, width = down_RDM.shape
        weights = self.layout.allocate(len(slices) + num_routed, width, hidden)
        for slot, (gate_up, down) in enumerate([*slices, *zip(gate_up_RMD, down_RDM, strict=True)]):
            self.layout.put(weights, slot, gate_up.detach(), down.detach())
        return LayerUnits(weights, np.arange(weights.num_slots, dtype=np.int32))

    def segments(
        self, ids_TLK: torch.Tensor, num_routed: int, num_shared: int, weights_TLK: torch.Tensor | None = None
    ) -> Segments:
        """Return the segments of these layers on the device: one copy of the ids, one launch, no wait for either."""
        if not ids_TLK.is_cuda and ((ids_TLK < -1) | (ids_TLK >= num_routed)).any():
            raise ValueError(f"expert ids must lie in [-1, {num_routed})")
        num_rows = ids_TLK.shape[0] * (num_shared + ids_TLK.shape[2])
        block_m = self.block_m(num_rows, num_shared + num_routed)
        ids_TLK = self._put(ids_TLK.to(torch.int32))
        built = triton_segments.build_on_device(ids_TLK, num_routed, num_shared=num_shared, block_m=block_m)
        return built if weights_TLK is None else segments.with_weights(built, self._put(weights_TLK))

    def prepare(self, groups: Sequence[GroupRows]) -> list[GroupRows]:
        """Return the groups with their arrays on the device: one copy for all. PregateError for a unit in no slot."""
        arrays, sizes = [], []
        for rows in groups:
            check_present(rows.slots, rows.counts)
            block_m = self.block_m(len(rows.row_index), len(rows.slots))
            tiles = segments.tile_list(rows.counts, block_m)
            arrays += [rows.slots, rows.row_index, np.array([len(tiles)]), tiles.reshape(-1)]
            sizes.append(block_m)
        if not groups:
            return []
        flat = self._put(torch.from_numpy(np.concatenate(arrays).astype(np.int32)))
        parts = iter(flat.split([len(array) for array in arrays]))
        prepared = []
        for rows, block_m in zip(groups, sizes, strict=True):
            unit_slot, row_token, num_tiles, tiles = (next(parts) for _ in range(4))
            work = _Work(block_m, len(row_token), len(tiles) // 3, row_token, None, tiles, num_tiles, unit_slot)
            prepared.append(replace(rows, made=work))
        return prepared

    def pairs(self, x_ND: torch.Tensor, rows: GroupRows, weights: LayerWeights) -> torch.Tensor:
        """Return [P, D]: one row per (row, unit) pair, in order. PregateError for a unit that is in no slot.

        Also for a few rows: the decode pair (C) would not serve better. Its advantage over A and B is that it needs no
        order and no index, and here both come with the plan, before the rows; and its down kernel sums over a token's
        units, where a host answers with every pair's own row.
        """
        work = rows.made
        if work is None:
            work = self.prepare([rows])[0].made
        h_PM = self._gate_up(x_ND.contiguous(), work, weights)
        return self._down(h_PM, work, weights, x_ND.new_empty(work.num_rows, x_ND.shape[1]), atomic=False)

    def dense(self, x_TD: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        """Return [T, D]: every row through the expert in slot 0."""
        num_tokens, segment = x_TD.shape[0], self._dense
        if segment is None or segment.num_tokens != num_tokens:
            # All layers of a step have as many tokens: the last one's rows are kept.
            ids_T1K = torch.zeros(num_tokens, 1, 0, dtype=torch.int32)
            built = segments.build(ids_T1K, 0, num_shared=1, block_m=self.block_m(num_tokens, 1))
            self._dense = segment = built.to(x_TD.device).layer(0)
        return self.layer(x_TD, segment, LayerUnits(weights, self._dense_slots, _on_device=self._dense_slots_on))

    def layer(self, x_TD: torch.Tensor, segment: Segment, units: LayerUnits) -> torch.Tensor:
        """Return [T, D]: each token's shared and routed units, summed. PregateError for a unit that is in no slot."""
        x_TD = x_TD.contiguous()
        units.check(segment, x_TD.shape[0])
        unit_slot = units.slots_on(x_TD.device)
        if x_TD.shape[0] <= triton_decode.MAX_TOKENS:
            return self._decode(x_TD, segment, units.weights, unit_slot)
        num_rows = segment.row_token.shape[0]
        work = _Work(
            segment.block_m,
            num_rows,
            segment.tiles.shape[0],
            segment.row_token,
            segment.row_weight,
            segment.tiles,
            segment.num_tiles,
            unit_slot,
        )
        h_PM = self._gate_up(x_TD, work, units.weights)
        if self._atomic:
            out_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
            return self._down(h_PM, work, units.weights, out_TD, atomic=True).to(x_TD.dtype)
        y_PD = self._down(h_PM, work, units.weights, x_TD.new_empty(num_rows, x_TD.shape[1]), atomic=False)
        return self._sum(y_PD, segment.row_of, torch.empty_like(x_TD))

    def _put(self, array: torch.Tensor) -> torch.Tensor:
        """`array` on the device; from the host in a copy that nobody waits for."""
        if self._device.type != "cuda" or array.is_cuda:
            return array.to(self._device)
        return array.pin_memory().to(self._device, non_blocking=True)

    def _sizes(self, kernel: str, block_m: int) -> BlockSizes:
        return FP32_SIZES if self._dtype == torch.float32 else self.table.sizes(kernel, block_m)

    def _grid(self, num_blocks: int, sizes: BlockSizes) -> int:
        return max(min(num_blocks, self._num_sms * sizes.programs_per_sm), 1)

    def _weight(self, stack: torch.Tensor, sizes: BlockSizes) -> Any:
        """The stack as one matrix: by TMA descriptor where the device has it and rows are aligned, else by pointer."""
        rows = stack.view(-1, stack.shape[-1])
        if self._tma and rows.stride(0) * rows.itemsize % 16 == 0:
            return TensorDescriptor.from_tensor(rows, [sizes.block_n, sizes.block_k])
        return rows

    def _gate_up(self, x_TD: torch.Tensor, work: _Work, weights: LayerWeights) -> torch.Tensor:
        sizes = self._sizes("gate_up", work.block_m)
        width, hidden = weights.down_SDM.shape[2], x_TD.shape[1]
        h_PM = x_TD.new_empty(work.num_rows, width)
        programs = self._grid(work.max_tiles * triton.cdiv(width, sizes.block_n), sizes)
        w = self._weight(weights.gate_up_SMD, sizes)
        _on_grid(triton_ffn.gate_up_kernel, programs)(
            x_TD,
            w,
            weights.gate_up_scale,
            h_PM,
            work.row_token,
            work.row_weight,
            work.tiles,
            work.num_tiles,
            work.unit_slot,
            hidden,
            width,
            ACT=self._act,
            BLOCK_M=work.block_m,
            BLOCK_N=sizes.block_n,
            BLOCK_K=sizes.block_k,
            SWAP=sizes.swap,
            TMA=isinstance(w, TensorDescriptor),
            WEIGHTED=work.row_weight is not None,
            SCALED=self._scaled,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
        return h_PM

    def _down(
        self, h_PM: torch.Tensor, work: _Work, weights: LayerWeights, out: torch.Tensor, *, atomic: bool
    ) -> torch.Tensor:
        sizes = self._sizes("down", work.block_m)
        hidden, width = out.shape[1], h_PM.shape[1]
        programs = self._grid(work.max_tiles * triton.cdiv(hidden, sizes.block_n), sizes)
        w = self._weight(weights.down_SDM, sizes)
        _on_grid(triton_ffn.down_kernel, programs)(
            h_PM,
            w,
            weights.down_scale,
            out,
            work.row_token,
            work.tiles,
            work.num_tiles,
            work.unit_slot,
            hidden,
            width,
            BLOCK_M=work.block_m,
            BLOCK_N=sizes.block_n,
            BLOCK_K=sizes.block_k,
            SWAP=sizes.swap,
            TMA=isinstance(w, TensorDescriptor),
            SCALED=self._scaled,
            ATOMIC=atomic,
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
        return out

    @staticmethod
    def _sum(y_PD: torch.Tensor, row_of_TJ: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
        num_tokens, num_columns = row_of_TJ.shape
        hidden = y_PD.shape[1]
        block_d = min(SUM_BLOCK_D, triton.next_power_of_2(hidden))
        launch = _on_grid(triton_ffn.sum_kernel, num_tokens, triton.cdiv(hidden, block_d))
        launch(y_PD, row_of_TJ, out_TD, hidden, num_columns, BLOCK_D=block_d)
        return out_TD

    def _decode(
        self, x_TD: torch.Tensor, segment: Segment, weights: LayerWeights, unit_slot: torch.Tensor
    ) -> torch.Tensor:
        (num_tokens, hidden), num_k = x_TD.shape, segment.ids_TK.shape[1]
        num_units, width = segment.num_units, weights.down_SDM.shape[2]
        half = triton_decode.HALF
        first, second = self._sizes("decode_gate_up", 16), self._sizes("decode_down", 16)
        h_TJM = x_TD.new_empty(num_tokens, segment.num_shared + num_k, width)
        shared = {"NUM_SHARED": segment.num_shared, "SCALED": self._scaled, "PADDED": triton_decode.PADDED_TOKENS}
        _on_grid(triton_decode.decode_gate_up_kernel, num_units, width // half)(
            x_TD,
            weights.gate_up_SMD,
            weights.gate_up_scale,
            h_TJM,
            segment.ids_TK,
            segment.weights_TK,
            unit_slot,
            num_tokens,
            hidden,
            width,
            num_k,
            ACT=self._act,
            BLOCK_K=first.block_k,
            WEIGHTED=segment.weights_TK is not None,
            HALF_N=half,
            num_warps=first.num_warps,
            num_stages=first.num_stages,
            **shared,
        )
        out_TD = torch.empty_like(x_TD)
        _on_grid(triton_decode.decode_down_kernel, triton.cdiv(hidden, second.block_n))(
            h_TJM,
            weights.down_SDM,
            weights.down_scale,
            out_TD,
            segment.ids_TK,
            unit_slot,
            num_tokens,
            hidden,
            width,
            num_k,
            num_units,
            BLOCK_N=second.block_n,
            BLOCK_K=second.block_k,
            num_warps=second.num_warps,
            num_stages=second.num_stages,
            **shared,
        )
        return out_TD


def _on_grid(kernel: Any, *grid: int) -> Any:
    """The launcher of a kernel; a launch's arguments are not those that the kernel's body is typed by."""
    return kernel[grid]


def _max_shared_bytes(device: torch.device) -> int:
    """What one block may have on `device`, as Triton asks before it launches."""
    index = torch.cuda.current_device() if device.index is None else device.index
    driver: Any = triton.runtime.driver.active
    return int(driver.utils.get_device_properties(index)["max_shared_mem"])


def _short(dtype: torch.dtype) -> str:
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}[dtype]

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

from pregate.base.device import to_device
from pregate.kernels import segments
from pregate.kernels.contract import ExpertFFN, Pair
from pregate.kernels.segments import Segment, Segments
from pregate.kernels.triton import decode as triton_decode
from pregate.kernels.triton import segments as triton_segments
from pregate.kernels.triton import tiled as triton_tiled
from pregate.kernels.triton.block_sizes import BlockSizes, BlockTable, block_m_for
from pregate.kernels.units import GroupRows, LayerUnits, check_present
from pregate.kernels.weights import LayerWeights, PaddedLayout, QuantisedLayout, split_shared

#: fp32 has no tensor-core product of full precision: small blocks that fit the registers, whatever the table says.
FP32_SIZES = BlockSizes(block_n=32, block_k=16, num_warps=8, num_stages=2)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
SHORT_NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
SUM_BLOCK_D = 1024
TILED = {"gate_up": triton_tiled.gate_up_kernel, "down": triton_tiled.down_kernel}
#: Programs of a persistent grid where there is no device to ask (the interpreter).
NUM_SMS_INTERPRETED = 3


@dataclass(frozen=True)
class _Work:
    """Rows of one launch pair, on the device: see `segments.Segment`."""

    block_m: int
    row_token: torch.Tensor
    tiles: torch.Tensor
    num_tiles: torch.Tensor
    unit_slot: torch.Tensor
    row_weight: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.row_token.shape[0]


class TritonFFN(ExpertFFN):
    """Kernels A and B over sorted rows; C for a whole layer of at most 8 tokens.

    `weight_dtype` int8 or float8_e4m3fn holds 8-bit weights with a scale per row. `tma` None uses it where the device
    has it.
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
        tma: bool | None = None,
    ) -> None:
        self.name = f"triton-{SHORT_NAMES[weight_dtype]}" if weight_dtype else "triton"
        self._act, self._device, self._dtype = ACTIVATIONS[act], device, dtype
        self._scaled = weight_dtype is not None
        self.why_no_layers = "it would round the shared experts too" if self._scaled else ""
        self.layout = QuantisedLayout(weight_dtype, device) if weight_dtype else PaddedLayout(dtype, device)
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
        return block_m_for(num_rows, num_units)

    def units(
        self, shared: Pair | None, num_shared: int, gate_up_RMD: torch.Tensor, down_RDM: torch.Tensor
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
        """As the contract says: one copy of the ids, one launch, no wait for either."""
        if not ids_TLK.is_cuda and ((ids_TLK < -1) | (ids_TLK >= num_routed)).any():
            raise ValueError(f"expert ids must lie in [-1, {num_routed})")
        num_rows = ids_TLK.shape[0] * (num_shared + ids_TLK.shape[2])
        block_m = self.block_m(num_rows, num_shared + num_routed)
        ids_TLK = to_device(ids_TLK.to(torch.int32), self._device)
        built = triton_segments.build_on_device(ids_TLK, num_routed, num_shared=num_shared, block_m=block_m)
        return built if weights_TLK is None else segments.with_weights(built, to_device(weights_TLK, self._device))

    def prepare(self, groups: Sequence[GroupRows]) -> list[GroupRows]:
        arrays, sizes = [], []
        for rows in groups:
            check_present(rows.slots, rows.counts)
            block_m = self.block_m(len(rows.row_index), len(rows.slots))
            tiles = segments.tile_list(rows.counts, block_m)
            arrays += [rows.slots, rows.row_index, np.array([len(tiles)]), tiles.reshape(-1)]
            sizes.append(block_m)
        if not groups:
            return []
        flat = to_device(torch.from_numpy(np.concatenate(arrays).astype(np.int32)), self._device)
        parts = iter(flat.split([len(array) for array in arrays]))
        prepared = []
        for rows, block_m in zip(groups, sizes, strict=True):
            unit_slot, row_token, num_tiles, tiles = (next(parts) for _ in range(4))
            prepared.append(replace(rows, made=_Work(block_m, row_token, tiles.view(-1, 3), num_tiles, unit_slot)))
        return prepared

    def pairs(self, x_ND: torch.Tensor, rows: GroupRows, weights: LayerWeights) -> torch.Tensor:
        """As the contract says, and for a few rows too: the decode pair (C) would not serve better.

        Its advantage over A and B is that it needs no order and no index, and here both come with the plan, before the
        rows; and its down kernel sums over a token's units, where a host answers with every pair's own row.
        """
        return self._rows(x_ND.contiguous(), rows.made or self.prepare([rows])[0].made, weights)

    def dense(self, x_TD: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        num_tokens, segment = x_TD.shape[0], self._dense
        if segment is None or segment.num_tokens != num_tokens:
            # All layers of a step have as many tokens: the last one's rows are kept.
            ids_T1K = torch.zeros(num_tokens, 1, 0, dtype=torch.int32)
            built = segments.build(ids_T1K, 0, num_shared=1, block_m=self.block_m(num_tokens, 1))
            self._dense = segment = built.to(x_TD.device).layer(0)
        return self.layer(x_TD, segment, LayerUnits(weights, self._dense_slots, _on_device=self._dense_slots_on))

    def layer(self, x_TD: torch.Tensor, segment: Segment, units: LayerUnits) -> torch.Tensor:
        x_TD = x_TD.contiguous()
        units.check(segment, x_TD.shape[0])
        unit_slot = units.slots_on(x_TD.device)
        if x_TD.shape[0] <= triton_decode.MAX_TOKENS:
            return self._decode(x_TD, segment, units.weights, unit_slot)
        tiles, num_tiles, row_token = segment.tiles, segment.num_tiles, segment.row_token
        work = _Work(segment.block_m, row_token, tiles, num_tiles, unit_slot, segment.row_weight)
        y_PD = self._rows(x_TD, work, units.weights)
        return self._sum(y_PD, segment.row_of, torch.empty_like(x_TD))

    def _sizes(self, kernel: str, block_m: int) -> BlockSizes:
        return FP32_SIZES if self._dtype == torch.float32 else self.table.sizes(kernel, block_m)

    def _weight(self, stack: torch.Tensor, sizes: BlockSizes) -> Any:
        """The stack as one matrix: by TMA descriptor where the device has it and rows are aligned, else by pointer."""
        rows = stack.view(-1, stack.shape[-1])
        if self._tma and rows.stride(0) * rows.itemsize % 16 == 0:
            return TensorDescriptor.from_tensor(rows, [sizes.block_n, sizes.block_k])
        return rows

    def _rows(self, x_TD: torch.Tensor, work: _Work, weights: LayerWeights) -> torch.Tensor:
        """Return [P, D]: A, then B, over the rows of `work`."""
        h_PM = x_TD.new_empty(work.num_rows, weights.down_SDM.shape[2])
        y_PD = x_TD.new_empty(work.num_rows, x_TD.shape[1])
        sizes = (x_TD.shape[1], h_PM.shape[1])
        rows, weighted = (work.row_token, work.row_weight), work.row_weight is not None
        up = (weights.gate_up_SMD, weights.gate_up_scale)
        self._tiled("gate_up", x_TD, *up, h_PM, rows, work, sizes, ACT=self._act, WEIGHTED=weighted)
        self._tiled("down", h_PM, weights.down_SDM, weights.down_scale, y_PD, (), work, sizes)
        return y_PD

    def _tiled(
        self,
        name: str,
        rows: torch.Tensor,
        stack: torch.Tensor,
        scale: torch.Tensor | None,
        out: torch.Tensor,
        index: tuple[torch.Tensor | None, ...],
        work: _Work,
        widths: tuple[int, int],
        **constants: object,
    ) -> None:
        """Launch kernel A or B by its `name`; `index` are the row arrays it reads, `widths` D and M."""
        sizes = self._sizes(name, work.block_m)
        num_blocks = work.tiles.shape[0] * triton.cdiv(out.shape[1], sizes.block_n)
        w = self._weight(stack, sizes)
        constants |= {"BLOCK_M": work.block_m, "BLOCK_N": sizes.block_n, "BLOCK_K": sizes.block_k, "SWAP": sizes.swap}
        constants |= {"TMA": isinstance(w, TensorDescriptor), "SCALED": self._scaled}
        constants |= {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
        arrays = (*index, work.tiles, work.num_tiles, work.unit_slot)
        programs = max(min(num_blocks, self._num_sms * sizes.programs_per_sm), 1)
        _on_grid(TILED[name], programs)(rows, w, scale, out, *arrays, *widths, **constants)

    @staticmethod
    def _sum(y_PD: torch.Tensor, row_of_TJ: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
        num_tokens, num_columns = row_of_TJ.shape
        hidden = y_PD.shape[1]
        block_d = min(SUM_BLOCK_D, triton.next_power_of_2(hidden))
        launch = _on_grid(triton_tiled.sum_kernel, num_tokens, triton.cdiv(hidden, block_d))
        launch(y_PD, row_of_TJ, out_TD, hidden, num_columns, BLOCK_D=block_d)
        return out_TD

    def _decode(
        self, x_TD: torch.Tensor, segment: Segment, weights: LayerWeights, unit_slot: torch.Tensor
    ) -> torch.Tensor:
        (num_tokens, hidden), num_k = x_TD.shape, segment.ids_TK.shape[1]
        num_units, width, half = segment.num_units, weights.down_SDM.shape[2], triton_decode.HALF
        first, second = self._sizes("decode_gate_up", 16), self._sizes("decode_down", 16)
        h_TJM, out_TD = x_TD.new_empty(num_tokens, segment.num_shared + num_k, width), torch.empty_like(x_TD)
        sizes = (num_tokens, hidden, width, num_k)
        both = {"NUM_SHARED": segment.num_shared, "SCALED": self._scaled, "PADDED": triton_decode.PADDED_TOKENS}
        up, down = (
            {"BLOCK_K": s.block_k, "num_warps": s.num_warps, "num_stages": s.num_stages} for s in (first, second)
        )
        up |= {"ACT": self._act, "WEIGHTED": segment.weights_TK is not None, "HALF_N": half}
        held = (weights.gate_up_SMD, weights.gate_up_scale)
        index = (segment.ids_TK, segment.weights_TK, unit_slot)
        launch = _on_grid(triton_decode.decode_gate_up_kernel, num_units, width // half)
        launch(x_TD, *held, h_TJM, *index, *sizes, **both, **up)
        held, index = (weights.down_SDM, weights.down_scale), (segment.ids_TK, unit_slot)
        launch = _on_grid(triton_decode.decode_down_kernel, triton.cdiv(hidden, second.block_n))
        launch(h_TJM, *held, out_TD, *index, *sizes, num_units, **both, **down, BLOCK_N=second.block_n)
        return out_TD


def _on_grid(kernel: Any, *grid: int) -> Any:
    """The launcher of a kernel; a launch's arguments are not those that the kernel's body is typed by."""
    return kernel[grid]


def _max_shared_bytes(device: torch.device) -> int:
    """What one block may have on `device`, as Triton asks before it launches."""
    index = torch.cuda.current_device() if device.index is None else device.index
    driver: Any = triton.runtime.driver.active
    return int(driver.utils.get_device_properties(index)["max_shared_mem"])

"""`ExpertHost`: plan and rows in, rows out. No Ray, no sockets; where experts come and go, a thread that fetches them.

Shape letters: N rows of a group, P (row, expert) pairs, D hidden width.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from pregate.base.errors import ProtocolError, UserError
from pregate.base.log import get_logger
from pregate.base.telemetry import span
from pregate.kernels import expert_ffn
from pregate.kernels.cpu.packed import fits_fp16
from pregate.kernels.tools.warm_up import warm_up_pairs
from pregate.kernels.units import GroupRows
from pregate.model.adapter import is_adapter
from pregate.model.checkpoint import CheckpointReader
from pregate.workers.client.local import LocalUnits
from pregate.workers.host.copies import Copies
from pregate.workers.host.options import HostOptions
from pregate.workers.host.plan_shelf import PlanShelf
from pregate.workers.host.prefetch import Prefetcher
from pregate.workers.host.prepared import PreparedPlan, prepare
from pregate.workers.host.residency import held_share
from pregate.workers.host.source import UnitSource
from pregate.workers.host.store import UnitStore
from pregate.workers.link.protocol import (
    MAX_MESSAGE_BYTES,
    CacheCounters,
    Expected,
    GroupIndex,
    GroupKey,
    Hello,
    HelloAck,
    HostPlan,
)
from pregate.workers.link.rows import dtype_name

_log = get_logger(__name__)


class ExpertHost:
    """Holds `units` of the checkpoint behind `reader` and runs them. Reads nothing else until it is asked for it.

    Raises UserError for a unit the checkpoint lacks and for options this machine cannot honour, CheckpointError for a
    damaged shard, where the reader looks at that.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        units: Iterable[tuple[int, int]],
        options: HostOptions,
        *,
        beside_engine: bool = False,
    ) -> None:
        self.options, units = options, sorted(set(units))
        self.incarnation = uuid.uuid4().hex
        self.fingerprint = reader.fingerprint
        self._reader = reader
        self._device = torch.device(options.device)
        self._dtype = expert_ffn.choose_dtype(options.dtype, self._device)
        widths = {reader.hidden_size, *(c.expert_width for c in reader.config.cuts if c.num_routed)}
        some = [layer for layer, cut in enumerate(reader.config.cuts) if cut.num_routed][:1]

        @cache
        def fits() -> bool:
            return any(fits_fp16(reader.read_unit(layer, 0)[0]) for layer in some)

        share, passing = 1.0, False
        if options.resident_experts is not None:  # else whether fp16 fits need not be known yet
            chosen = options.resident_experts, options.expert_ffn, self._device, self._dtype
            share, passing, _ = held_share(reader, [layer for layer, _ in units], *chosen, fits)
        self._ffn = expert_ffn.choose(
            options.expert_ffn,
            self._device,
            self._dtype,
            act=reader.hidden_act,
            widths=widths,
            fits_fp16=fits,
            passing=passing,
            stored=reader.unit_dtype,
        )
        # Of an engine in this process that runs whole layers, shared experts come too.
        reserve = beside_engine and self._ffn.shared_in_segments
        with reader.checked():
            self._store = UnitStore(
                reader,
                units,
                self._ffn.layout,
                share=share,
                source=UnitSource(reader, options.host_memory, pinned=self._device.type == "cuda"),
                copies=Copies(self._device),
                spare_slots=options.spare_slots or 0,
                reserve_shared=reserve,
            )
        if self._store.tiered and is_adapter(reader.path):
            _log.warning(
                "host %d: an adapter's experts come and go: with each its layer's whole down projection is read of the "
                "parent; of a checkpoint, as `pregate apply` writes it, the expert alone", options.host_id,
            )  # fmt: skip
        self._looks_ahead = options.lookahead and self._store.tiered
        self._prefetcher = Prefetcher(self._store) if self._looks_ahead else None
        self._plans = PlanShelf(options.num_plans)
        self._turn = threading.Lock()  # of a group, or of a change of what this host is home to
        self._num_groups = 0
        self._num_rows = 0
        self._num_pairs = 0
        self._num_prepared = 0

    def warm_up(self) -> None:
        if not self._ffn.compiles:
            return
        started_s = time.perf_counter()
        x_1D = torch.zeros(1, self._reader.hidden_size, dtype=self._dtype, device=self._device)
        layer_of_width = {self._reader.config.cuts[layer].expert_width: layer for layer, _ in self._store.units()}
        for layer in layer_of_width.values():
            warm_up_pairs(self._ffn, self._store.weights(layer), x_1D, self.options.max_rows)
        taken_s = time.perf_counter() - started_s
        _log.info("host %d: kernels of %s compiled in %.1f s", self.options.host_id, self._ffn.name, taken_s)

    def accept(self, hello: Hello, *, heartbeat_s: float, data_endpoint: str) -> HelloAck:
        check_hello(hello, self.options, fingerprint=self.fingerprint, width=self._reader.hidden_size)
        return HelloAck(
            self.options.host_id,
            self.incarnation,
            os.getpid(),
            hello.max_rows,
            self._store.stats.num_units,
            heartbeat_s,
            data_endpoint,
            int(self._looks_ahead),
        )

    def put_plan(self, engine: str, plan: HostPlan) -> None:
        try:
            plan.check()
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if self._looks_ahead:
            used_LR = np.zeros(self._store.shape, dtype=bool)
            used_LR[plan.layer_of_unit, plan.expert_ids] = True
            self._store.plan(engine, plan.step, used_LR)
        host_id, pairs = self.options.host_id, len(plan.row_index)
        traces = plan.traces.split() if pairs else ()
        spans = tuple(span("host step", trace, host=host_id, step=plan.step, pairs=pairs) for trace in traces)
        self._plans.put(engine, replace(prepare(plan, self._ffn, self._store), spans=spans))

    def expect(self, engine: str, expected: Expected) -> None:
        if not self.options.lookahead:
            return
        try:
            with self._turn:
                self._store.expect(engine, expected)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if self._prefetcher is None:  # all it is home to is held: it serves for a host that is lost
            self._prefetcher = Prefetcher(self._store)

    def forget(self, engine: str) -> None:
        self._plans.forget(engine)
        self._store.forget(engine)

    def hold(self, units: Iterable[tuple[int, int]]) -> None:
        """Be home to these units from now on, and to no others; returns when all are read. From any one thread, while
        another computes. Raises what a unit could not be read for, when all others have been."""
        failed: Exception | None = None
        with self._turn:
            loads = self._store.rehome(units)
        for load in loads:
            try:
                self._store.carry_out(load)
            except Exception as error:  # noqa: BLE001 - raised below: the other slots are to be filled first
                failed = error
        if failed is not None:
            raise failed

    def close(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.stop()

    def compute(self, key: GroupKey, rows_ND: torch.Tensor, index: GroupIndex | None) -> torch.Tensor:
        prepared = self._plans.get(key) if index is None else None
        index = self._index_of(key, rows_ND.shape[0], index, prepared)
        self._check_size(rows_ND, index)
        y_PD = rows_ND.new_empty(0, rows_ND.shape[1])
        if index.num_pairs:
            x_ND = rows_ND.to(self._device, self._dtype)
            with self._turn, torch.no_grad():
                if self._store.tiered:
                    y_PD = self._compute_in_waves(key, x_ND, index)
                else:
                    rows, weights = self._rows_of(key.layer, index, prepared)
                    y_PD = self._ffn.pairs(x_ND, rows, weights)
        self._count(1, rows_ND.shape[0], index.num_pairs)
        if prepared is not None:
            prepared.ends(key.layer)
        return y_PD.to(rows_ND.device, rows_ND.dtype)

    def local_units(self, device: torch.device, dtype: torch.dtype) -> LocalUnits | str:
        if (device, dtype) != (self._device, self._dtype):
            return f"the host computes on {self._device} in {dtype_name(self._dtype)}"
        if self._ffn.why_no_layers:
            return f"{self._ffn.name}: {self._ffn.why_no_layers}"
        if self._store.tiered and self._store.most_units < max(c.num_routed for c in self._reader.config.cuts):
            return "there is not room for the experts of two layers"
        return LocalUnits(self._ffn, self._store, self._reader.config.cuts, self._count, self._looks_ahead)

    def _index_of(
        self, key: GroupKey, num_rows: int, index: GroupIndex | None, prepared: PreparedPlan | None
    ) -> GroupIndex:
        """Return the group's own index, or the plan's; ProtocolError where it does not fit the rows."""
        try:
            if prepared is None:
                assert index is not None
                index.check(num_rows)
                return index
            plan = prepared.plan
            if not 0 <= key.layer < plan.num_layers or plan.num_rows[key.layer] != num_rows:
                raise ValueError(f"layer {key.layer}: {num_rows} rows came, the plan says otherwise")
            return plan.layer(key.layer)
        except ValueError as error:
            raise ProtocolError(f"step {key.step}: {error}") from error

    def _rows_of(self, layer: int, index: GroupIndex, prepared: PreparedPlan | None) -> tuple[GroupRows, Any]:
        """Return what was prepared for the group and the layer's weights; else look its units up now, reading what is
        missing."""
        if prepared is not None and (rows := prepared.rows_of(layer, self._store)) is not None:
            self._num_prepared += 1
            return rows, self._store.weights(layer)
        slots, weights = self._store.lookup(layer, index.expert_ids)
        return GroupRows(slots, index.counts, index.row_index), weights

    def _compute_in_waves(self, key: GroupKey, x_ND: torch.Tensor, index: GroupIndex) -> torch.Tensor:
        """Return [P, D] of units that come and go, as many at a time as there are slots for."""
        store = self._store
        if self._looks_ahead:
            store.reach(key.engine, key.step, key.layer)
        y_PD = None
        pairs_of_unit = np.split(np.arange(index.num_pairs), np.cumsum(index.counts)[:-1])
        for places in (waves := store.waves(key.layer, index.expert_ids)):
            try:
                slots, weights = store.lookup(key.layer, index.expert_ids[places])
                if len(waves) == 1:
                    return self._ffn.pairs(x_ND, GroupRows(slots, index.counts, index.row_index), weights)
                pairs = np.concatenate([pairs_of_unit[place] for place in places])
                rows = GroupRows(slots, index.counts[places], index.row_index[pairs])
                part_PD = self._ffn.pairs(x_ND, rows, weights)
            finally:
                store.release()
            y_PD = part_PD.new_empty(index.num_pairs, part_PD.shape[1]) if y_PD is None else y_PD
            y_PD[torch.from_numpy(pairs).to(y_PD.device)] = part_PD
        assert y_PD is not None
        return y_PD

    def _count(self, num_groups: int, num_rows: int, num_pairs: int) -> None:
        """Note that many groups, or layers, of `num_rows` rows each with `num_pairs` pairs in all."""
        self._num_groups += num_groups
        self._num_rows += num_groups * num_rows
        self._num_pairs += num_pairs

    def _check_size(self, rows_ND: torch.Tensor, index: GroupIndex) -> None:
        """Hold the group to what the handshake allowed and the answer to what a message may be."""
        width = self._reader.hidden_size
        if rows_ND.shape[1] != width or rows_ND.shape[0] > self.options.max_rows:
            allowed = f"at most {self.options.max_rows} rows of width {width}"
            raise ProtocolError(f"group of {list(rows_ND.shape)}; allowed: {allowed}")
        answer_bytes = index.num_pairs * width * rows_ND.itemsize
        if answer_bytes > MAX_MESSAGE_BYTES // 2:
            raise ProtocolError(f"group asks for an answer of {answer_bytes} bytes; allowed: {MAX_MESSAGE_BYTES // 2}")

    def cache_counters(self) -> CacheCounters:
        return replace(self._store.stats)

    @property
    def steady(self) -> bool:
        return not self._store.tiered

    def held_units(self) -> np.ndarray:
        return self._store.held

    def status(self) -> dict[str, Any]:
        return {
            "host_id": self.options.host_id,
            "incarnation": self.incarnation,
            "pid": os.getpid(),
            "expert_ffn": self._ffn.name,
            "dtype": dtype_name(self._dtype),
            "num_groups": self._num_groups,
            "num_rows": self._num_rows,
            "num_pairs": self._num_pairs,
            "num_prepared": self._num_prepared,
            **asdict(self._store.stats),
        }


def check_hello(hello: Hello, options: HostOptions, *, fingerprint: str, width: int) -> None:
    """Raise UserError naming the first term of the handshake that does not fit this host."""
    if hello.fingerprint != fingerprint:
        raise UserError.of(
            "checkpoint",
            hello.fingerprint[:12],
            f"host {options.host_id} serves {fingerprint[:12]}; use one checkpoint",
        )
    if hello.width != width:
        raise UserError.of("width", hello.width, f"host {options.host_id} has hidden width {width}")
    if hello.dtype not in expert_ffn.COMPUTE_DTYPES[1:]:
        raise UserError.of("dtype", hello.dtype, f"allowed: {', '.join(expert_ffn.COMPUTE_DTYPES[1:])}")
    if not 1 <= hello.max_rows <= options.max_rows:
        raise UserError.of("max_rows", hello.max_rows, f"allowed: 1 to {options.max_rows}")

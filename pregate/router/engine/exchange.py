"""Rows out to the expert hosts and back: dispatch returns a receipt, combine takes it back.

Data on its way: x [T, D] on the engine's device -> per host its rows [n, D] -> one returned row per (token,
expert) pair -> added to the shared expert's output in ascending expert id, so the sum does not depend on placement.

Shape letters: T tokens, D hidden width, K experts per token, L layers, R routed experts, H hosts, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from pregate.base.errors import HostLostError
from pregate.model.paths import Paths
from pregate.router.engine.planning import LayerPlan, StepPlan, make_plan
from pregate.workers.link.protocol import GroupKey

if TYPE_CHECKING:
    from pregate.workers.client.host_client import HostClient, LocalLayers


@dataclass(frozen=True)
class Receipt:
    """What is away in one layer: whom to ask for which group, where its rows belong, and what they weigh (None: 1)."""

    layer: int
    keys: tuple[tuple[HostClient, GroupKey], ...]
    slots_TK: torch.Tensor
    weights_TK: torch.Tensor | None = None


@dataclass
class _Step:
    """The step in progress. `plan` is None while gates decide layer by layer; `weights_TLK` are its paths', or None."""

    number: int
    num_tokens: int
    plan: StepPlan | None
    pair_counts_TH: np.ndarray
    slots_LTK: list[torch.Tensor] = field(default_factory=list)
    weights_TLK: torch.Tensor | None = None


class Exchange:
    """Sends a step's token groups to their hosts and puts the answers together. One engine thread uses it.

    Where `local` is set, to the one host's layers, steps with exact paths send nothing: its `run` computes a layer.
    """

    def __init__(
        self, engine: str, clients: Sequence[HostClient], hosts_of_LR: np.ndarray, group_timeout_s: float = 30.0
    ) -> None:
        self.engine, self.clients, self.hosts_of_LR = engine, list(clients), hosts_of_LR
        self.group_timeout_s = group_timeout_s
        self.local: LocalLayers | None = None
        self._step = _Step(-1, 0, None, np.zeros((0, len(clients)), dtype=np.int64))

    def begin_step(self, number: int, num_tokens: int, paths: Paths | None) -> None:
        """Open step `number`. With exact paths plan all layers now and tell every host its share, once."""
        for client in self.clients:
            client.abandon_groups()  # of a step that failed
        plan = weights = None
        counts = np.zeros((num_tokens, len(self.clients)), dtype=np.int64)
        if paths is not None and self.local is not None:
            self.local.begin(paths.ids, paths.weights)
            counts[:, 0] = (paths.ids >= 0).sum(axis=(1, 2))
        elif paths is not None:
            plan = make_plan(number, paths.ids, self.hosts_of_LR, len(self.clients))
            weights = None if paths.weights is None else torch.from_numpy(paths.weights)
            counts = plan.pair_counts_TH
            for host, host_plan in plan.hosts.items():
                self.clients[host].send_plan(host_plan)
        slots = [torch.from_numpy(_with_spare_row(layer)) for layer in plan.layers] if plan else []
        self._step = _Step(number, num_tokens, plan, counts, slots, weights)

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor | None, weights_TK: torch.Tensor | None = None
    ) -> Receipt:
        """Send the rows of `layer`. `ids_TK` are a gate's choices, None when the step's plan already has them.

        `weights_TK` weigh the experts' outputs when they are added, None when all are 1; the plan's paths have their
        own.
        """
        step = self._step
        planned = ids_TK is None
        if planned:
            assert step.plan is not None, "dispatch without ids needs a step with paths"
            layer_plan, slots = step.plan.layers[layer], step.slots_LTK[layer]
            weights_TK = None if step.weights_TLK is None else step.weights_TLK[:, layer]
        else:
            ids_T1K = ids_TK.cpu().numpy().astype(np.int16)[:, None]
            plan = make_plan(step.number, ids_T1K, self.hosts_of_LR[layer : layer + 1], len(self.clients))
            step.pair_counts_TH += plan.pair_counts_TH
            layer_plan = plan.layers[0]
            slots = torch.from_numpy(_with_spare_row(layer_plan))
        x_TD = x_TD.cpu()
        keys = []
        for number, group in enumerate(layer_plan.groups):
            key = GroupKey(self.engine, step.number, layer, number)
            rows_ND = x_TD[torch.from_numpy(group.rows)] if len(group.rows) < step.num_tokens else x_TD
            self.clients[group.host].send_group(key, rows_ND, None if planned else group.index)
            keys.append((self.clients[group.host], key))
        return Receipt(layer, tuple(keys), slots, weights_TK)

    def combine(self, receipt: Receipt, out_TD: torch.Tensor) -> torch.Tensor:
        """Wait for the groups of `receipt` and add each token's experts to `out_TD` in ascending expert id."""
        answers = [client.receive(key, self.group_timeout_s) for client, key in receipt.keys]
        spare_1D = torch.zeros(1, out_TD.shape[1], dtype=out_TD.dtype)
        rows_PD = torch.cat([*answers, spare_1D]).to(out_TD.device)
        weights_TK = None if receipt.weights_TK is None else receipt.weights_TK.to(rows_PD)
        for column, slots_T in enumerate(receipt.slots_TK.to(out_TD.device).unbind(dim=1)):
            y_TD = rows_PD[slots_T]
            out_TD = out_TD + (y_TD if weights_TK is None else y_TD * weights_TK[:, column, None])
        return out_TD

    def end_step(self) -> np.ndarray:
        """Close the step; return how many (token, expert) pairs of each token each host served [T, H]."""
        return self._step.pair_counts_TH

    def poll(self) -> None:
        """Take in heartbeats of every host, without blocking; HostLostError while one has been silent too long."""
        lost = None
        for client in self.clients:
            try:
                client.poll()
            except HostLostError as error:
                lost = lost or error
        if lost is not None:
            raise lost


def _with_spare_row(layer: LayerPlan) -> np.ndarray:
    """Slots int64 [T, K] in which -1 became the row after the last answer, which is all zeros."""
    num_pairs = sum(len(g.index.row_index) for g in layer.groups)
    return np.where(layer.slots < 0, num_pairs, layer.slots).astype(np.int64)

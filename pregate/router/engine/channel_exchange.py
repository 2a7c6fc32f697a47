"""`ChannelExchange`: rows out to the expert hosts and back, from others where one of them is lost meanwhile.

Data on its way: x [T, D] on the engine's device -> per host its rows [n, D] -> one returned row per (token,
expert) pair -> added to the shared expert's output in ascending expert id, so the sum does not depend on placement.

Shape letters: T tokens, D hidden width, K experts per token, L layers, R routed experts, H hosts, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pregate.base.device import to_device
from pregate.base.errors import HostLostError
from pregate.model.gates import Choice
from pregate.model.paths import Paths
from pregate.router.engine.exchange import Receipt, SentGroup
from pregate.router.engine.expectations import Expectations
from pregate.router.engine.lookahead import rest_of_step
from pregate.router.engine.members import Members
from pregate.router.engine.planning import StepPlan, check_plan, make_plan
from pregate.router.engine.shared_experts import SharedExperts
from pregate.router.engine.split import split
from pregate.workers.client.host_client import HostClient
from pregate.workers.link.protocol import Expected, GroupKey


@dataclass
class _Step:
    """The step in progress. `paths` and `plan` are None while gates decide layer by layer; its slots [L, T, K] and its
    paths' weights [L, T, K], or None, are on the engine's device."""

    number: int
    num_tokens: int
    pair_counts_TH: np.ndarray
    paths: Paths | None = None
    plan: StepPlan | None = None
    slots_LTK: torch.Tensor | None = None
    weights_LTK: torch.Tensor | None = None


class ChannelExchange:
    """Sends a step's token groups to their hosts and puts the answers together; see `Exchange`.

    A host that is lost in a step costs its groups a second way: the receipt has what it takes, and who lives reads the
    units it lacks. The answers keep their places, so that the sum is the same to the last bit.
    The shared expert runs here while the rows are away.
    """

    def __init__(
        self,
        engine: str,
        members: Members,
        shared: SharedExperts,
        group_timeout_s: float = 30.0,
        check_plans: bool = False,
        wants_lookahead: bool = False,
    ) -> None:
        self.engine, self.members, self.shared = engine, members, shared
        self.group_timeout_s, self.check_plans = group_timeout_s, check_plans
        self._expectations = Expectations(members, always=wants_lookahead)
        self._step = _Step(-1, 0, np.zeros((0, len(self.clients)), dtype=np.int64))
        self.traces = ""
        #: Parts of groups have numbers of their own, so that no two that a host is asked for are called the same.
        self._part_numbers = itertools.count(1 << 16)

    @property
    def clients(self) -> Sequence[HostClient]:
        return self.members.clients

    @property
    def placement(self) -> list[list[int]]:
        return self.members.hosts_of_LR.tolist()

    @property
    def rows_LR(self) -> np.ndarray:  # noqa: N802
        return self.members.rows_LR

    @property
    def lost(self) -> Mapping[int, str]:
        return self.members.lost

    @property
    def lost_at_s(self) -> Mapping[int, float]:
        return self.members.lost_at_s

    def replace(self, host: int, client: HostClient) -> None:
        self.members.replace(host, client)

    def place(self, copies_LRC: np.ndarray, num_hosts: int) -> None:
        self.members.place(copies_LRC, num_hosts)

    def hold_shared(self, layer: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self.shared.hold(layer, gate_up, down)

    def warm_up(self, step_tokens: int) -> None:
        for client in self.clients:
            client.warm_up()
        self.shared.warm_up(step_tokens)

    @property
    def wants_lookahead(self) -> bool:
        return self._expectations.wanted

    def expect(self, expected: Expected) -> None:
        self._expectations.tell(expected)

    def foretell(self, ids: Mapping[int, np.ndarray]) -> None:
        self.expect(rest_of_step(self._step.number, ids, self.shared.config.cuts))

    def held_LR(self) -> np.ndarray | None:  # noqa: N802
        held_LRC = self.members.held_LRC()
        return None if held_LRC is None else np.logical_or.reduce(held_LRC, axis=2)

    def begin_step(self, number: int, num_tokens: int, paths: Paths | None) -> None:
        """As the protocol says; with paths every host is sent its share of the plan, once."""
        self.members.look_after_lost()
        for client in self.clients:
            client.abandon()  # of a step that failed
        if paths is None:
            self._step = _Step(number, num_tokens, np.zeros((num_tokens, len(self.clients)), dtype=np.int64))
            self._expectations.tell_anew(number)
            return
        plan = self._plan(number, paths.ids, self.members.hosts_for(paths.ids))
        device, weights = self.shared.device, None
        if paths.weights is not None:
            weights = to_device(torch.from_numpy(paths.weights.swapaxes(0, 1)), device)
        for host, host_plan in plan.hosts.items():
            try:
                self.clients[host].send_plan(replace(host_plan, traces=self.traces) if self.traces else host_plan)
            except HostLostError as error:
                self.members.lose(host, error)
        slots_LTK = to_device(torch.from_numpy(plan.slots_LTK), device)
        self._step = _Step(number, num_tokens, plan.pair_counts_TH, paths, plan, slots_LTK, weights)
        self._expectations.tell_anew(number, paths)

    def dispatch(self, layer: int, x_TD: torch.Tensor, choice: Choice | None = None) -> Receipt:
        step = self._step
        if choice is not None:
            ids_T1K = choice.ids.cpu().numpy().astype(np.int16)[:, None]
            plan = self._plan(step.number, ids_T1K, self.members.hosts_for(ids_T1K, layer))
            step.pair_counts_TH += plan.pair_counts_TH
            groups, weights = plan.layers[0], choice.weights
            slots = to_device(torch.from_numpy(plan.slots_LTK[0]), self.shared.device)
        elif step.plan is not None:
            assert step.slots_LTK is not None
            groups, slots = step.plan.layers[layer], step.slots_LTK[layer]
            weights = None if step.weights_LTK is None else step.weights_LTK[layer]
        else:
            assert not self.shared.config.cuts[layer].num_active, "dispatch without a choice needs a step with paths"
            groups, slots, weights = (), None, None
        if not groups:
            return Receipt(layer, self.shared.run(layer, x_TD))
        out_TD, rows_TD = None, x_TD
        if x_TD.is_cuda:
            # The shared expert is launched behind the copy; only the copy is waited for.
            rows_TD = torch.empty_like(x_TD, device="cpu", pin_memory=True).copy_(x_TD, non_blocking=True)
            left = torch.cuda.Event()
            left.record()
            out_TD = self.shared.run(layer, x_TD)
            left.synchronize()
        sent = []
        for number, group in enumerate(groups):
            rows_ND = rows_TD[torch.from_numpy(group.rows)] if len(group.rows) < step.num_tokens else rows_TD
            key = GroupKey(self.engine, step.number, layer, number)
            sent.append(self._send(SentGroup(group.host, key, rows_ND, group.index), planned=choice is None))
        if out_TD is None:
            out_TD = self.shared.run(layer, x_TD)
        return Receipt(layer, out_TD, tuple(sent), slots, weights)

    def _send(self, group: SentGroup, planned: bool = False) -> SentGroup:
        """Send a group to its host, else to others. `planned`: the host's plan says which rows visit which experts."""
        if group.host not in self.lost:
            try:
                self.clients[group.host].send_group(group.key, group.rows_ND, None if planned else group.index)
                return group
            except HostLostError as error:
                self._lose(group, error)
        return self._send_elsewhere(group)

    def _lose(self, group: SentGroup, error: HostLostError) -> None:
        """Fence the host of a group; those who serve its units from now on begin to load them."""
        self.members.lose(group.host, error)
        self._expectations.tell_anew(self._step.number, self._step.paths, group.key.layer)

    def _send_elsewhere(self, group: SentGroup) -> SentGroup:
        """Send a group of a lost host to those that serve its units now, with its index: it needs no plan."""
        self.members.check()
        parts = []
        for part in split(group.index, self.members.hosts_of_LR[group.key.layer]):
            key = group.key._replace(group=next(self._part_numbers), attempt=0)
            rows_ND = group.rows_ND[torch.from_numpy(part.rows)]
            parts.append((part.pairs, self._send(SentGroup(part.host, key, rows_ND, part.index))))
        return group._replace(parts=tuple(parts))

    def _receive(self, group: SentGroup) -> torch.Tensor:
        """Wait for a group's answer [P, D], from whoever gives it."""
        if not group.parts and group.host not in self.lost:
            try:
                return self.clients[group.host].receive(group.key, self.group_timeout_s)
            except HostLostError as error:
                self._lose(group, error)
        if not group.parts:
            group = self._send_elsewhere(group)
        y_PD = group.rows_ND.new_empty(group.index.num_pairs, group.rows_ND.shape[1])
        for pairs, part in group.parts:
            y_PD[torch.from_numpy(pairs)] = self._receive(part)
        return y_PD

    def combine(self, receipt: Receipt) -> torch.Tensor:
        out_TD = receipt.out_TD
        if not receipt.groups:
            return out_TD
        assert receipt.slots_TK is not None
        answers = [self._receive(group) for group in receipt.groups]
        spare_1D = torch.zeros(1, out_TD.shape[1], dtype=out_TD.dtype)
        rows_PD = to_device(torch.cat([*answers, spare_1D]), self.shared.device)
        weights_TK = None if receipt.weights_TK is None else receipt.weights_TK.to(rows_PD)
        for column, slots_T in enumerate(receipt.slots_TK.unbind(dim=1)):
            y_TD = rows_PD[slots_T]
            out_TD = out_TD + (y_TD if weights_TK is None else y_TD * weights_TK[:, column, None])
        return out_TD

    def end_step(self) -> np.ndarray:
        return self._step.pair_counts_TH

    def poll(self) -> None:
        self.members.poll()
        self._expectations.tell_anew(self._step.number)

    def _plan(self, number: int, ids_TLK: np.ndarray, hosts_of: np.ndarray) -> StepPlan:
        plan = make_plan(number, ids_TLK, hosts_of, len(self.clients), self.members.hosts_of_LR.shape[1])
        if self.check_plans:
            check_plan(plan, ids_TLK, hosts_of)
        return plan

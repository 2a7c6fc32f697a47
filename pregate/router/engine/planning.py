"""Paths + placement -> plan: which rows go to which host in which layer, made once, before layer 0.

Every array of every layer comes out of one compiled pass (`plan_loops.py`), whose time goes with the pairs; what hosts
are sent, and a layer's groups, are cut out of it when they are asked for.

Shape letters: T tokens, L layers, K experts per token, R routed experts, H hosts, A hosts that are asked, G groups of
rows, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pregate.router.engine.plan_loops import plan_hosts, plan_layers
from pregate.workers.link.protocol import GroupIndex, HostPlan


class LayerGroup(NamedTuple):
    """The rows of one layer that go to one host. `rows` int32 [n]: token rows of the step, ascending."""

    host: int
    rows: np.ndarray
    index: GroupIndex


def make_plan(step: int, ids_TLK: np.ndarray, hosts_of: np.ndarray, num_hosts: int, num_routed: int = 0) -> StepPlan:
    """Plan a step from path ids int16 [T, L, K] (-1 padding) and each unit's host int [L, R], or, where units' rows
    part, each pair's host int [T, L, K] and the largest number of experts of a layer.

    Example: T = 2, L = 1, ids [[[0, 1]], [[1, 2]]], hosts_of [[0, 0, 1]] gives host 0 rows [0, 1] with experts
    [0, 1], counts [1, 2], row_index [0, 0, 1]; host 1 rows [1] with expert [2], counts [1], row_index [0];
    slots [[[0, 1], [2, 3]]].
    """
    by_unit = hosts_of.ndim == 2
    hosts = np.ascontiguousarray(hosts_of[None] if by_unit else hosts_of, dtype=np.int16)
    num_routed = hosts_of.shape[1] if by_unit else num_routed
    num_tokens, num_layers, k_max = ids_TLK.shape
    fits = hosts.shape[1] == num_layers if by_unit else hosts.shape == ids_TLK.shape
    if not fits:  # compiled loops look at no shapes
        raise ValueError(f"hosts {hosts_of.shape} are not of paths {ids_TLK.shape}")
    ids = np.ascontiguousarray(ids_TLK, dtype=np.int16)
    slots_LTK = np.empty((num_layers, num_tokens, k_max), dtype=np.int64)
    lists_5P = np.empty((5, ids_TLK.size), dtype=np.int32)
    groups_4G = np.empty((4, min(ids_TLK.size, num_layers * num_hosts) + 1), dtype=np.int32)
    starts_L = np.empty(num_layers + 1, dtype=np.int32)
    unit = plan_layers(ids, hosts, by_unit, num_hosts, num_routed, slots_LTK, lists_5P, groups_4G, starts_L)
    if unit >= 0:
        raise ValueError(f"placement: unit {divmod(unit, 1 << 16)} has no host")
    return StepPlan(step, num_hosts, _Groups(groups_4G, starts_L, *lists_5P), slots_LTK)


@dataclass(frozen=True)
class _Groups:
    """Flat arrays over the groups that have rows, by layer, then host. `groups_4G`: each group's host, and where its
    rows, units and pairs begin, after the last where they end; `start_L` [L + 1]: where each layer's groups begin."""

    groups_4G: np.ndarray
    start_L: np.ndarray
    token_P: np.ndarray
    row_index_P: np.ndarray
    rows_N: np.ndarray
    experts_U: np.ndarray
    counts_U: np.ndarray

    def of_layer(self, layer: int) -> tuple[LayerGroup, ...]:
        first, end = self.start_L[layer : layer + 2].tolist()
        hosts, *starts = self.groups_4G[:, first : end + 1].tolist()
        cuts = (map(slice, start, start[1:]) for start in starts)
        return tuple(
            LayerGroup(h, self.rows_N[n], GroupIndex(self.experts_U[u], self.counts_U[u], self.row_index_P[p]))
            for h, n, u, p in zip(hosts[:-1], *cuts, strict=True)
        )

    def host_plans(self, step: int, num_hosts: int) -> dict[int, HostPlan]:
        """What each host that is asked for anything is sent up front."""
        num_groups, num_layers = self.start_L[-1], len(self.start_L) - 1
        _, _, num_units, num_pairs = self.groups_4G[:, num_groups].tolist()
        hosts_A = np.flatnonzero(np.bincount(self.groups_4G[0, :num_groups]))
        num_rows_AL = np.zeros((len(hosts_A), num_layers), dtype=np.int32)
        offsets_2AL = np.zeros((2, len(hosts_A), num_layers + 1), dtype=np.int32)
        start_2A = np.empty((2, len(hosts_A) + 1), dtype=np.int32)
        units_2U, row_index_P = np.empty((2, num_units), dtype=np.int32), np.empty(num_pairs, dtype=np.int32)
        groups = self.experts_U, self.counts_U, self.row_index_P, self.groups_4G, self.start_L
        plan_hosts(*groups, hosts_A, num_hosts, num_rows_AL, offsets_2AL, start_2A, units_2U, row_index_P)
        experts, counts = units_2U
        cuts = (map(slice, s, s[1:]) for s in start_2A.tolist())
        return {
            host: HostPlan(step, num_rows, unit_offsets, experts[u], counts[u], pair_offsets, row_index_P[p])
            for host, num_rows, unit_offsets, pair_offsets, u, p in zip(
                hosts_A.tolist(), num_rows_AL, *offsets_2AL, *cuts, strict=True
            )
        }


class _Layers(Sequence[tuple[LayerGroup, ...]]):
    """Every layer's groups in ascending host order, made when a layer is first asked for: most of a plan's objects
    are these, and the first layer need not wait for the last one's."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups
        self._made: list[tuple[LayerGroup, ...] | None] = [None] * (len(groups.start_L) - 1)

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, layer: Any) -> Any:
        if self._made[layer] is None:
            self._made[layer] = self._groups.of_layer(layer)
        return self._made[layer]


@dataclass(frozen=True)
class StepPlan:
    """One step: every layer's groups (`layers`), and what goes to each host.

    `slots_LTK` int64: where each token finds its experts' rows, in ascending id, in the layer's answers laid end to
    end; the row after the last one where it has fewer than K experts.
    """

    step: int
    num_hosts: int
    groups: _Groups
    slots_LTK: np.ndarray

    @cached_property
    def layers(self) -> Sequence[tuple[LayerGroup, ...]]:
        return _Layers(self.groups)

    @cached_property
    def pair_counts_TH(self) -> np.ndarray:  # noqa: N802
        """Pairs per token and host int64 [T, H]."""
        num_tokens, groups_4G = self.slots_LTK.shape[1], self.groups.groups_4G[:, : self.groups.start_L[-1] + 1]
        pair_start_G = groups_4G[3]
        host_P = np.repeat(groups_4G[0, :-1], np.diff(pair_start_G))
        token_P = self.groups.token_P[: len(host_P)]
        counts = np.bincount(token_P * self.num_hosts + host_P, minlength=num_tokens * self.num_hosts)
        return counts.reshape(num_tokens, self.num_hosts)

    @cached_property
    def hosts(self) -> dict[int, HostPlan]:
        """What each host that is asked for anything is sent up front, made when first wanted: gates want none."""
        return self.groups.host_plans(self.step, self.num_hosts)


def check_plan(plan: StepPlan, ids_TLK: np.ndarray, hosts_of: np.ndarray) -> None:
    """Raise AssertionError unless every pair is served exactly once, by its host, in slot order."""
    for layer, groups in enumerate(plan.layers):
        served: list[tuple[int, int]] = []
        for group in groups:
            assert (np.diff(group.rows) > 0).all(), "a token's row travels once to a host"
            assert (np.diff(group.index.expert_ids) > 0).all(), "units ascend"
            experts = np.repeat(group.index.expert_ids, group.index.counts)
            tokens = group.rows[group.index.row_index]
            if hosts_of.ndim == 2:
                hosts = hosts_of[layer, experts]
            else:
                hosts = hosts_of[tokens, layer, (ids_TLK[tokens, layer] == experts[:, None]).argmax(axis=1)]
            assert (hosts == group.host).all(), "only the host that serves the pair is asked"
            served += zip(tokens.tolist(), experts.tolist(), strict=True)
            sent = plan.hosts[group.host].layer(layer)
            assert np.array_equal(sent.row_index, group.index.row_index), "the host plan says the same"
        wanted = {(t, int(e)) for t, row in enumerate(ids_TLK[:, layer]) for e in row if e >= 0}
        assert len(served) == len(wanted) and set(served) == wanted, "every pair once"
        for token, row in enumerate(ids_TLK[:, layer]):
            for column, expert in enumerate(row):
                slot = plan.slots_LTK[layer, token, column]
                assert (slot == len(served)) == (expert < 0), "padding finds the row after the last"
                assert expert < 0 or served[slot] == (token, expert), "slots point at the pair's own row"

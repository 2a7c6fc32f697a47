"""Paths + placement -> plan: which rows go to which host in which layer, made once, before layer 0.

NumPy only. Every array of every layer comes out of one vectorised pass (two sorts of all pairs), and its time goes with
the pairs, not with the hosts.

Shape letters: T tokens, L layers, K experts per token, R routed experts, H hosts, A hosts that are asked, G groups of
rows, U units of groups, N rows of groups, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pregate.workers.link.protocol import GroupIndex, HostPlan


@dataclass(frozen=True)
class LayerGroup:
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
    num_layers, k_max = ids_TLK.shape[1:]
    num_routed = hosts_of.shape[1] if hosts_of.ndim == 2 else num_routed
    group_P, expert_P, place_P = _pairs(ids_TLK, hosts_of)
    # Pairs in the order in which hosts are asked. One number each, from its high bits down: group, which is host and
    # layer, then expert, then its place in ids: so sorting plain numbers sorts pairs, and shifts take them apart again.
    place_bits, expert_bits = ids_TLK.size.bit_length(), max(1, num_routed).bit_length()
    asked_P = group_P << expert_bits
    asked_P += expert_P
    asked_P <<= place_bits
    asked_P += place_P
    asked_P.sort()
    unit_P = asked_P >> place_bits
    asked_P &= (1 << place_bits) - 1
    if len(unit_P) and unit_P[0] < 0:
        layer, expert = (unit_P[0] >> expert_bits) % num_layers, unit_P[0] & (1 << expert_bits) - 1
        raise ValueError(f"placement: unit ({layer}, {expert}) has no host")
    unit_start_U = _starts_of_runs(unit_P)
    unit_U = unit_P[unit_start_U]
    group_U = unit_U >> expert_bits
    unit_start_G = _starts_of_runs(group_U)
    pair_start_G = np.append(unit_start_U[unit_start_G], len(unit_P))
    number_P = np.repeat(np.arange(len(unit_start_G)), np.diff(pair_start_G))  # of each pair's group
    rows_N, row_start_G, row_of_place = _rows(group_P, place_P, ids_TLK.shape, number_P, pair_start_G)
    groups = _Groups(
        id_G=group_U[unit_start_G],
        num_layers=num_layers,
        pair_start=pair_start_G,
        row_start=row_start_G,
        unit_start=np.append(unit_start_G, len(group_U)),
        rows=rows_N,
        experts=(unit_U & (1 << expert_bits) - 1).astype(np.int32),
        counts=np.diff(unit_start_U, append=len(unit_P)).astype(np.int32),
        row_index=row_of_place.take(asked_P),
    )
    token_P = asked_P // max(1, num_layers * k_max)
    slots_LTK = _slots(groups, asked_P, token_P, number_P, ids_TLK.shape)
    return StepPlan(step, num_hosts, groups, slots_LTK, token_P)


def _pairs(ids_TLK: np.ndarray, hosts_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs in the order of ids: group (host * L + layer, below 0 without a host), expert, place in ids."""
    num_layers, k_max = ids_TLK.shape[1:]
    expert_P, place_P = ids_TLK.reshape(-1), np.arange(ids_TLK.size)
    layer_P = np.tile(np.repeat(np.arange(num_layers), k_max), len(ids_TLK))
    if not (real_P := expert_P >= 0).all():
        expert_P, place_P, layer_P = expert_P[real_P], place_P[real_P], layer_P[real_P]
    where_P = place_P if hosts_of.ndim == 3 else layer_P * hosts_of.shape[1] + expert_P
    group_P = hosts_of.reshape(-1)[where_P] * np.int64(num_layers)
    group_P += layer_P
    return group_P, expert_P, place_P


def _rows(
    group_P: np.ndarray, place_P: np.ndarray, shape: tuple[int, ...], number_P: np.ndarray, pair_start_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of each group, its pairs' tokens, each once and ascending; where each group's begin [G + 1]; and which
    row of its group the pair of each place has. `number_P`, `pair_start_G`: groups of pairs sorted by group. Writes
    over `group_P`."""
    size, num_layers, k_max = shape[0] * shape[1] * shape[2], shape[1], shape[2]
    place_bits = size.bit_length()
    if int(group_P.max(initial=0)) < 1 << 31 - place_bits:
        group_P = group_P.astype(np.int32)  # sorted in half of the time
    group_P <<= place_bits
    group_P += place_P
    group_P.sort()
    place_P = group_P & (1 << place_bits) - 1
    token_P = place_P // max(1, k_max)  # token * L + layer: a group is of one layer
    new_P = np.empty(len(place_P), dtype=bool)
    np.not_equal(token_P[1:], token_P[:-1], out=new_P[1:])
    new_P[pair_start_G[:-1]] = True
    until_P = np.concatenate([[0], np.cumsum(new_P)])
    row_start_G = until_P.take(pair_start_G)
    row_of_place = np.empty(size, dtype=np.int32)
    row_of_place[place_P] = until_P[1:] - (row_start_G + 1).take(number_P)
    return (token_P[new_P] // max(1, num_layers)).astype(np.int32), row_start_G, row_of_place


def _slots(
    groups: _Groups, asked_P: np.ndarray, token_P: np.ndarray, number_P: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Where tokens find their experts' rows int64 [L, T, K]: `StepPlan.slots_LTK`. Writes over `asked_P`."""
    num_tokens, num_layers, k_max = shape
    first_G, num_pairs_L = groups.first_answers()
    slots_LTK = np.empty((num_layers, num_tokens, k_max), dtype=np.int64)
    if len(asked_P) < slots_LTK.size:
        slots_LTK[:] = num_pairs_L[:, None, None]
    asked_P += token_P * (k_max - num_layers * k_max)  # from places in [T, L, K] to places in [L, T, K]
    asked_P += (groups.id_G % max(1, num_layers) * (num_tokens * k_max - k_max)).take(number_P)
    slot_P = (first_G - groups.pair_start[:-1]).take(number_P)
    slot_P += np.arange(len(slot_P))
    slots_LTK.reshape(-1)[asked_P] = slot_P
    return slots_LTK


def _starts_of_runs(values: np.ndarray) -> np.ndarray:
    """Where the runs of equal values begin."""
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(values[1:] != values[:-1])
    starts += 1
    return np.concatenate([[0], starts])


@dataclass(frozen=True)
class _Groups:
    """Flat arrays over the groups that have rows, by host, then layer (`id_G`: host * L + layer), and each group's
    start in them [G + 1]."""

    id_G: np.ndarray
    num_layers: int
    pair_start: np.ndarray
    row_start: np.ndarray
    unit_start: np.ndarray
    rows: np.ndarray
    experts: np.ndarray
    counts: np.ndarray
    row_index: np.ndarray

    @cached_property
    def by_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """The groups by layer, then host, and where each layer's begin in that order [L + 1]."""
        layer_G = (self.id_G % self.num_layers).astype(np.int16)
        return np.argsort(layer_G, kind="stable"), _starts(np.bincount(layer_G, minlength=self.num_layers))

    def first_answers(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each group's answers begin among its layer's, which lie in order of hosts [G], and a layer's number
        of answers [L]."""
        order_G, start_L = self.by_layer
        until_G = _starts(np.diff(self.pair_start)[order_G])
        first_G = np.empty(len(order_G), dtype=np.int64)
        num_groups_L = np.diff(start_L)
        first_G[order_G] = until_G[:-1] - np.repeat(until_G[start_L[:-1]], num_groups_L)
        return first_G, np.diff(until_G[start_L])

    def of_layer(self, layer: int) -> tuple[LayerGroup, ...]:
        order_G, start_L = self.by_layer
        return tuple(self._group(g) for g in order_G[start_L[layer] : start_L[layer + 1]].tolist())

    def _group(self, g: int) -> LayerGroup:
        units = slice(self.unit_start[g], self.unit_start[g + 1])
        pairs = slice(self.pair_start[g], self.pair_start[g + 1])
        index = GroupIndex(self.experts[units], self.counts[units], self.row_index[pairs])
        rows = self.rows[self.row_start[g] : self.row_start[g + 1]]
        return LayerGroup(int(self.id_G[g]) // self.num_layers, rows, index)

    def host_plans(self, step: int) -> dict[int, HostPlan]:
        """What each host that is asked for anything is sent up front."""
        host_G, layer_G = np.divmod(self.id_G, self.num_layers)
        first_A = _starts_of_runs(host_G)
        end_A = np.append(first_A[1:], len(host_G))[: len(first_A)]
        at_G = np.repeat(np.arange(len(first_A)), end_A - first_A), layer_G
        counts_3AL = np.zeros((3, len(first_A), self.num_layers), dtype=np.int32)
        for counts_AL, starts in zip(counts_3AL, (self.row_start, self.unit_start, self.pair_start), strict=True):
            counts_AL[at_G] = np.diff(starts)
        offsets_3AL = np.zeros((3, len(first_A), self.num_layers + 1), dtype=np.int32)
        np.cumsum(counts_3AL, axis=2, out=offsets_3AL[..., 1:])
        plans = {}
        for a, (first, end) in enumerate(zip(first_A.tolist(), end_A.tolist(), strict=True)):
            units = slice(self.unit_start[first], self.unit_start[end])
            pairs = slice(self.pair_start[first], self.pair_start[end])
            plans[int(host_G[first])] = HostPlan(
                step=step,
                num_rows=counts_3AL[0, a],
                unit_offsets=offsets_3AL[1, a],
                expert_ids=self.experts[units],
                counts=self.counts[units],
                pair_offsets=offsets_3AL[2, a],
                row_index=self.row_index[pairs],
            )
        return plans


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of so many things begins, end to end, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts)])


class _Layers(Sequence[tuple[LayerGroup, ...]]):
    """Every layer's groups in ascending host order, made when a layer is first asked for: most of a plan's objects
    are these, and the first layer need not wait for the last one's."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups
        self._made: list[tuple[LayerGroup, ...] | None] = [None] * groups.num_layers

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
    end; the row after the last one where it has fewer than K experts. `token_P`: of all pairs,
    group after group.
    """

    step: int
    num_hosts: int
    groups: _Groups
    slots_LTK: np.ndarray
    token_P: np.ndarray

    @cached_property
    def layers(self) -> Sequence[tuple[LayerGroup, ...]]:
        return _Layers(self.groups)

    @cached_property
    def pair_counts_TH(self) -> np.ndarray:  # noqa: N802
        """Pairs per token and host int64 [T, H]."""
        num_tokens = self.slots_LTK.shape[1]
        host_P = np.repeat(self.groups.id_G // self.groups.num_layers, np.diff(self.groups.pair_start))
        counts = np.bincount(self.token_P * self.num_hosts + host_P, minlength=num_tokens * self.num_hosts)
        return counts.reshape(num_tokens, self.num_hosts)

    @cached_property
    def hosts(self) -> dict[int, HostPlan]:
        """What each host that is asked for anything is sent up front, made when first wanted: gates want none."""
        return self.groups.host_plans(self.step)


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

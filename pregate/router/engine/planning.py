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
    (num_tokens, num_layers, k_max), by_unit = ids_TLK.shape, hosts_of.ndim == 2
    num_routed = hosts_of.shape[1] if by_unit else num_routed
    # A pair is one number, from its high bits down: host, layer, expert, and its place in ids, which has its token. So
    # sorting plain numbers sorts pairs, and shifts take them apart again.
    place_bits, expert_bits = ids_TLK.size.bit_length(), max(1, num_routed).bit_length()
    layers_L1 = np.arange(num_layers)[:, None]
    expert_of = np.arange(num_routed) if by_unit else ids_TLK
    units = (hosts_of.astype(np.int64) * num_layers + layers_L1 << expert_bits) + expert_of
    place_P = np.arange(ids_TLK.size)
    unit_P = (ids_TLK + layers_L1 * num_routed).reshape(-1) if by_unit else place_P
    if not (real := (ids_TLK >= 0).reshape(-1)).all():
        place_P, unit_P = place_P[real], unit_P[real]
    pairs_P = (units << place_bits).reshape(-1).take(unit_P) + place_P
    pairs_P.sort()
    place_P, unit_P = pairs_P & (1 << place_bits) - 1, pairs_P >> place_bits
    if len(pairs_P) and unit_P[0] < 0:
        layer, expert = (unit_P[0] >> expert_bits) % num_layers, unit_P[0] & (1 << expert_bits) - 1
        raise ValueError(f"placement: unit ({layer}, {expert}) has no host")
    unit_start_U, unit_end_U = _runs(unit_P)
    group_U = unit_P[unit_start_U] >> expert_bits
    unit_start_G, _ = _runs(group_U)
    pair_start_G = np.append(unit_start_U, len(pairs_P))[np.append(unit_start_G, len(group_U))]
    group_P = np.repeat(np.arange(len(unit_start_G)), np.diff(pair_start_G))
    token_P = place_P // (num_layers * k_max)
    rows_N, row_start_G, row_index_P = _rows(group_P, token_P, pair_start_G)
    groups = _Groups(
        id_G=group_U[unit_start_G],
        num_layers=num_layers,
        pair_start=pair_start_G,
        row_start=row_start_G,
        unit_start=np.append(unit_start_G, len(group_U)),
        rows=rows_N,
        experts=(unit_P[unit_start_U] & (1 << expert_bits) - 1).astype(np.int32),
        counts=(unit_end_U - unit_start_U).astype(np.int32),
        row_index=row_index_P,
    )
    first_G, num_pairs_L = groups.first_answers()
    slots_TLK = np.empty((num_tokens, num_layers, k_max), dtype=np.int64)
    slots_TLK[:] = num_pairs_L[:, None]
    slots_TLK.reshape(-1)[place_P] = (first_G - pair_start_G[:-1])[group_P] + np.arange(len(pairs_P))
    host_P = (groups.id_G // num_layers)[group_P]
    return StepPlan(step, num_hosts, groups, np.ascontiguousarray(slots_TLK.swapaxes(0, 1)), token_P, host_P)


def _rows(
    group_P: np.ndarray, token_P: np.ndarray, pair_start_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of each group, its pairs' tokens, each once and ascending; where each group's begin [G + 1]; and which
    row of its group each pair has."""
    num_pairs, token_bits = len(group_P), int(token_P.max(initial=0)).bit_length()
    place_bits, number_P = num_pairs.bit_length(), np.arange(num_pairs)
    by_token_P = group_P << token_bits  # in place from here: half of the time is fresh memory
    by_token_P += token_P
    by_token_P <<= place_bits
    by_token_P += number_P
    by_token_P.sort()
    place_P = by_token_P & (1 << place_bits) - 1
    by_token_P >>= place_bits
    start_N, end_N = _runs(by_token_P)
    row_P = number_P if len(start_N) == num_pairs else np.repeat(number_P[: len(start_N)], end_N - start_N)
    row_start_G = np.append(row_P, len(start_N))[pair_start_G]
    row_index_P = np.empty(num_pairs, dtype=np.int32)
    row_index_P[place_P] = row_P - row_start_G[group_P]
    return (by_token_P[start_N] & (1 << token_bits) - 1).astype(np.int32), row_start_G, row_index_P


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the runs of equal values begin, and where they end."""
    starts = np.flatnonzero(np.concatenate([[len(values) > 0], values[1:] != values[:-1]])[: len(values)])
    return starts, np.append(starts[1:], len(values))[: len(starts)]


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
        first_A, end_A = _runs(host_G)
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
    end; the row after the last one where it has fewer than K experts. `token_P`, `host_P`: of all pairs.
    """

    step: int
    num_hosts: int
    groups: _Groups
    slots_LTK: np.ndarray
    token_P: np.ndarray
    host_P: np.ndarray

    @cached_property
    def layers(self) -> Sequence[tuple[LayerGroup, ...]]:
        return _Layers(self.groups)

    @cached_property
    def pair_counts_TH(self) -> np.ndarray:  # noqa: N802
        """Pairs per token and host int64 [T, H]."""
        num_tokens = self.slots_LTK.shape[1]
        counts = np.bincount(self.token_P * self.num_hosts + self.host_P, minlength=num_tokens * self.num_hosts)
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

"""Paths + placement -> plan: which rows go to which host in which layer, made once, before layer 0.

NumPy only. Every array of every layer comes out of one vectorised pass (one sort of all pairs).

Shape letters: T tokens, L layers, K experts per token, R routed experts, H hosts, P (token, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pregate.workers.link.protocol import GroupIndex, HostPlan


@dataclass(frozen=True)
class LayerGroup:
    """The rows of one layer that go to one host. `rows` int32 [n]: token rows of the step, ascending."""

    host: int
    rows: np.ndarray
    index: GroupIndex


@dataclass(frozen=True)
class _Pairs:
    """All (token, layer, expert) pairs of a step sorted by host, layer, expert, token."""

    token: np.ndarray
    layer: np.ndarray
    column: np.ndarray
    expert: np.ndarray
    host: np.ndarray


def _sorted_pairs(ids_TLK: np.ndarray, hosts_of_LR: np.ndarray) -> _Pairs:
    token, layer, column = np.nonzero(ids_TLK >= 0)
    expert = ids_TLK[token, layer, column].astype(np.int64)
    host = hosts_of_LR[layer, expert].astype(np.int64)
    if host.size and host.min() < 0:
        bad = int(np.argmin(host))
        raise ValueError(f"placement: unit ({layer[bad]}, {expert[bad]}) has no host")
    num_tokens, num_layers, _ = ids_TLK.shape
    key = ((host * num_layers + layer) * hosts_of_LR.shape[1] + expert) * num_tokens + token
    order = np.argsort(key, kind="stable")
    return _Pairs(token[order], layer[order], column[order], expert[order], host[order])


def _starts(values: np.ndarray, size: int) -> np.ndarray:
    """Offsets [size + 1] of the runs of each value 0 .. size - 1 in a sorted array."""
    return np.searchsorted(values, np.arange(size + 1))


def make_plan(step: int, ids_TLK: np.ndarray, hosts_of_LR: np.ndarray, num_hosts: int) -> StepPlan:
    """Plan a step from path ids int16 [T, L, K] (-1 padding) and each unit's home host int [L, R].

    Example: T = 2, L = 1, ids [[[0, 1]], [[1, 2]]], hosts_of [[0, 0, 1]] gives host 0 rows [0, 1] with experts
    [0, 1], counts [1, 2], row_index [0, 0, 1]; host 1 rows [1] with expert [2], counts [1], row_index [0];
    slots [[[0, 1], [2, 3]]].
    """
    num_tokens, num_layers, k_max = ids_TLK.shape
    num_routed = hosts_of_LR.shape[1]
    pairs = _sorted_pairs(ids_TLK, hosts_of_LR)
    group = pairs.host * num_layers + pairs.layer
    num_groups = num_hosts * num_layers
    pair_start = _starts(group, num_groups)
    row_key, row_of_pair = np.unique(group * num_tokens + pairs.token, return_inverse=True)
    row_start = _starts(row_key // max(num_tokens, 1), num_groups)
    unit_key, unit_count = np.unique(group * num_routed + pairs.expert, return_counts=True)
    unit_start = _starts(unit_key // max(num_routed, 1), num_groups)
    arrays = _Arrays(
        pair_start=pair_start,
        row_start=row_start,
        unit_start=unit_start,
        rows=(row_key % max(num_tokens, 1)).astype(np.int32),
        experts=(unit_key % max(num_routed, 1)).astype(np.int32),
        counts=unit_count.astype(np.int32),
        row_index=(row_of_pair.reshape(-1) - row_start[group]).astype(np.int32),
    )
    pairs_HL = np.diff(pair_start).reshape(num_hosts, num_layers)
    base_HL = np.cumsum(pairs_HL, axis=0) - pairs_HL
    slots_LTK = np.empty((num_layers, num_tokens, k_max), dtype=np.int64)
    slots_LTK[:] = pairs_HL.sum(axis=0)[:, None, None]
    slots_LTK[pairs.layer, pairs.token, pairs.column] = (
        np.arange(len(group)) - pair_start[group] + base_HL.reshape(-1)[group]
    )
    counts_TH = np.bincount(pairs.token * num_hosts + pairs.host, minlength=num_tokens * num_hosts)
    layers = tuple(arrays.layer_groups(layer, num_hosts, num_layers) for layer in range(num_layers))
    return StepPlan(step, layers, slots_LTK, counts_TH.reshape(num_tokens, num_hosts), arrays)


@dataclass(frozen=True)
class _Arrays:
    """Flat arrays over all groups (host-major), with each group's start in them."""

    pair_start: np.ndarray
    row_start: np.ndarray
    unit_start: np.ndarray
    rows: np.ndarray
    experts: np.ndarray
    counts: np.ndarray
    row_index: np.ndarray

    def layer_groups(self, layer: int, num_hosts: int, num_layers: int) -> tuple[LayerGroup, ...]:
        found = []
        for host in range(num_hosts):
            g = host * num_layers + layer
            rows = self.rows[self.row_start[g] : self.row_start[g + 1]]
            if not len(rows):
                continue
            units = slice(self.unit_start[g], self.unit_start[g + 1])
            pairs = slice(self.pair_start[g], self.pair_start[g + 1])
            index = GroupIndex(self.experts[units], self.counts[units], self.row_index[pairs])
            found.append(LayerGroup(host, rows, index))
        return tuple(found)

    def host_plan(self, step: int, host: int, num_layers: int) -> HostPlan | None:
        first, last = host * num_layers, (host + 1) * num_layers
        if self.pair_start[first] == self.pair_start[last]:
            return None
        units = self.unit_start[first : last + 1]
        pairs = self.pair_start[first : last + 1]
        return HostPlan(
            step=step,
            num_rows=np.diff(self.row_start[first : last + 1]).astype(np.int32),
            unit_offsets=(units - units[0]).astype(np.int32),
            expert_ids=self.experts[units[0] : units[-1]],
            counts=self.counts[units[0] : units[-1]],
            pair_offsets=(pairs - pairs[0]).astype(np.int32),
            row_index=self.row_index[pairs[0] : pairs[-1]],
        )


@dataclass(frozen=True)
class StepPlan:
    """One step: every layer's groups in ascending host order, and pairs per token and host [T, H].

    `slots_LTK` int64: where each token finds its experts' rows, in ascending id, in the layer's answers laid end to
    end; the row after the last one where it has fewer than K experts.
    """

    step: int
    layers: tuple[tuple[LayerGroup, ...], ...]
    slots_LTK: np.ndarray
    pair_counts_TH: np.ndarray
    arrays: _Arrays

    @cached_property
    def hosts(self) -> dict[int, HostPlan]:
        """What each host that is asked for anything is sent up front, made when first wanted: gates want none."""
        plans = (
            (h, self.arrays.host_plan(self.step, h, len(self.layers))) for h in range(self.pair_counts_TH.shape[1])
        )
        return {h: plan for h, plan in plans if plan is not None}


def check_plan(plan: StepPlan, ids_TLK: np.ndarray, hosts_of_LR: np.ndarray) -> None:
    """Raise AssertionError unless every pair is served exactly once, by its unit's home host, in slot order."""
    for layer, groups in enumerate(plan.layers):
        served: list[tuple[int, int]] = []
        for group in groups:
            assert (np.diff(group.rows) > 0).all(), "a token's row travels once to a host"
            assert (np.diff(group.index.expert_ids) > 0).all(), "units ascend"
            experts = np.repeat(group.index.expert_ids, group.index.counts)
            assert (hosts_of_LR[layer, experts] == group.host).all(), "only the home host is asked"
            served += zip(group.rows[group.index.row_index].tolist(), experts.tolist(), strict=True)
            sent = plan.hosts[group.host].layer(layer)
            assert np.array_equal(sent.row_index, group.index.row_index), "the host plan says the same"
        wanted = {(t, int(e)) for t, row in enumerate(ids_TLK[:, layer]) for e in row if e >= 0}
        assert len(served) == len(wanted) and set(served) == wanted, "every pair once"
        for token, row in enumerate(ids_TLK[:, layer]):
            for column, expert in enumerate(row):
                slot = plan.slots_LTK[layer, token, column]
                assert (slot == len(served)) == (expert < 0), "padding finds the row after the last"
                assert expert < 0 or served[slot] == (token, expert), "slots point at the pair's own row"

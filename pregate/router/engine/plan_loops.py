"""The loops over a step's pairs that make its plan, compiled: what they write `planning.py` says.

Shape letters: T tokens, L layers, K experts per token, R routed experts, H hosts, A hosts that are asked, X pairs of a
layer, G groups, U units of groups, N rows of groups, P pairs.
"""

from __future__ import annotations

import numpy as np

from pregate.base.compiled import compiled, inlined

#: The type of ids and hosts, which may be views of a message.
_IDS = "Array(i2, 3, 'C', readonly=True)"


@inlined()
def _sort_by(key_X: np.ndarray, order_X: np.ndarray, sorted_X: np.ndarray, start: np.ndarray) -> None:
    """Write `order_X` by ascending key, equal ones as they were; key k's begin at `start` [k], of keys + 2.

    Example: keys [2, 0, 2, 0], order [0, 1, 2, 3]: sorted [1, 3, 0, 2], start [0, 2, 2, 4, 4].
    """
    start[:] = 0
    for x in order_X:
        start[key_X[x] + 2] += 1
    for key in range(2, len(start)):
        start[key] += start[key - 1]
    for x in order_X:
        sorted_X[start[key_X[x] + 1]] = x
        start[key_X[x] + 1] += 1


@inlined()
def _take_pairs(
    ids_TLK: np.ndarray, hosts_of: np.ndarray, by_unit: bool, layer: int, num_routed: int, pairs_5X: np.ndarray,
    last_H: np.ndarray, num_rows_H: np.ndarray,
) -> int:  # fmt: skip
    """Write a layer's pairs: expert, host, token, place in [T, K], row in the host's group. Returns how many there
    are; below 0, what `plan_layers` is to return, less one."""
    num_tokens, _, k_max = ids_TLK.shape
    last_H[:] = -1
    num_rows_H[:] = 0
    num = 0
    for token in range(num_tokens):
        for column in range(k_max):
            expert = ids_TLK[token, layer, column]
            if expert < 0:
                continue
            host = np.int16(-1)
            if expert < num_routed:
                host = hosts_of[0, layer, expert] if by_unit else hosts_of[token, layer, column]
            if host < 0 or host >= len(last_H):
                return -1 - (layer << 16 | expert)
            if last_H[host] != token:  # a token's row travels once to a host
                last_H[host] = token
                num_rows_H[host] += 1
            pairs_5X[0, num], pairs_5X[1, num], pairs_5X[2, num] = expert, host, token
            pairs_5X[3, num], pairs_5X[4, num] = token * k_max + column, num_rows_H[host] - 1
            num += 1
    return num


@inlined()
def _cut_groups(
    pairs_5X: np.ndarray, asked_X: np.ndarray, start_H: np.ndarray, num_rows_H: np.ndarray, slots_X: np.ndarray,
    lists_5P: np.ndarray, groups_4G: np.ndarray, group: int,
) -> int:  # fmt: skip
    """Write a layer's groups, the first of which begins where `groups_4G` says of `group`; returns the next one."""
    row, unit, pair = groups_4G[1, group], groups_4G[2, group], groups_4G[3, group]
    for host in range(len(num_rows_H)):
        if start_H[host] == start_H[host + 1]:
            continue
        last = -1
        for n in range(start_H[host], start_H[host + 1]):
            x = asked_X[n]
            if pairs_5X[0, x] != last:
                last = pairs_5X[0, x]
                lists_5P[3, unit], lists_5P[4, unit] = last, 0
                unit += 1
            lists_5P[4, unit - 1] += 1
            slots_X[pairs_5X[3, x]] = n
            lists_5P[0, pair], lists_5P[1, pair] = pairs_5X[2, x], pairs_5X[4, x]
            lists_5P[2, row + pairs_5X[4, x]] = pairs_5X[2, x]
            pair += 1
        row += num_rows_H[host]
        groups_4G[0, group] = host
        group += 1
        groups_4G[1, group], groups_4G[2, group], groups_4G[3, group] = row, unit, pair
    return group


@compiled(f"i8({_IDS}, {_IDS}, b1, i8, i8, i8[:,:,::1], i4[:,::1], i4[:,::1], i4[::1])")
def plan_layers(
    ids_TLK: np.ndarray,
    hosts_of: np.ndarray,
    by_unit: bool,
    num_hosts: int,
    num_routed: int,
    slots_LTK: np.ndarray,
    lists_5P: np.ndarray,
    groups_4G: np.ndarray,
    group_start_L: np.ndarray,
) -> int:
    """Write, layer after layer and in each host after host: each pair's token, its row in its group, groups' rows,
    their units' experts and the pairs of these (`lists_5P`); of each group its host and where its rows, units and pairs
    begin, and after the last where they end (`groups_4G`); where each layer's groups begin [L + 1].

    `hosts_of`: of each pair [T, L, K], or `by_unit` [1, L, R]. Returns -1, or of a unit without host
    layer << 16 | expert.
    """
    num_tokens, num_layers, k_max = ids_TLK.shape
    num_places = num_tokens * k_max
    pairs_5X, all_X = np.empty((5, num_places), np.int32), np.arange(num_places)
    by_expert_X, asked_X = np.empty(num_places, np.int32), np.empty(num_places, np.int32)
    start_R, start_H = np.empty(num_routed + 2, np.int32), np.empty(num_hosts + 2, np.int32)
    last_H, num_rows_H = np.empty(num_hosts, np.int32), np.empty(num_hosts, np.int32)
    groups_4G[:, 0] = 0
    group_start_L[0] = 0
    for layer in range(num_layers):
        num = _take_pairs(ids_TLK, hosts_of, by_unit, layer, num_routed, pairs_5X, last_H, num_rows_H)
        if num < 0:
            return -1 - num
        _sort_by(pairs_5X[0], all_X[:num], by_expert_X, start_R)
        _sort_by(pairs_5X[1], by_expert_X[:num], asked_X, start_H)
        slots_X = slots_LTK[layer].reshape(num_places)
        if num < num_places:
            slots_X[:] = num
        first = group_start_L[layer]
        group_start_L[layer + 1] = _cut_groups(
            pairs_5X, asked_X, start_H, num_rows_H, slots_X, lists_5P, groups_4G, first
        )
    return -1


@compiled(
    "void(i4[::1], i4[::1], i4[::1], i4[:,::1], i4[::1], i8[::1], i8,"
    " i4[:,::1], i4[:,:,::1], i4[:,::1], i4[:,::1], i4[::1])"
)
def plan_hosts(
    experts_U: np.ndarray,
    counts_U: np.ndarray,
    row_index_P: np.ndarray,
    groups_4G: np.ndarray,
    group_start_L: np.ndarray,
    hosts_A: np.ndarray,
    num_hosts: int,
    num_rows_AL: np.ndarray,
    offsets_2AL: np.ndarray,
    start_2A: np.ndarray,
    sent_2U: np.ndarray,
    sent_P: np.ndarray,
) -> None:
    """Write what each asked host is sent, host after host and of each layer after layer: rows of its layers, where
    these's units and pairs begin [2, A, L + 1], all from 0; where its own begin in all [2, A + 1]; experts and counts
    of units, and pairs' rows."""
    num_layers = len(group_start_L) - 1
    number_H = np.empty(num_hosts, np.int32)
    for asked, host in enumerate(hosts_A):
        number_H[host] = asked
    for layer in range(num_layers):
        for group in range(group_start_L[layer], group_start_L[layer + 1]):
            asked = number_H[groups_4G[0, group]]
            num_rows_AL[asked, layer] = groups_4G[1, group + 1] - groups_4G[1, group]
            for n in range(2):
                offsets_2AL[n, asked, layer + 1] = groups_4G[n + 2, group + 1] - groups_4G[n + 2, group]
    for n in range(2):
        start_2A[n, 0] = 0
        for asked in range(len(hosts_A)):
            for layer in range(num_layers):
                offsets_2AL[n, asked, layer + 1] += offsets_2AL[n, asked, layer]
            start_2A[n, asked + 1] = start_2A[n, asked] + offsets_2AL[n, asked, num_layers]
    for layer in range(num_layers):
        for group in range(group_start_L[layer], group_start_L[layer + 1]):
            asked = number_H[groups_4G[0, group]]
            to = start_2A[0, asked] + offsets_2AL[0, asked, layer]
            for unit in range(groups_4G[2, group], groups_4G[2, group + 1]):
                sent_2U[0, to], sent_2U[1, to] = experts_U[unit], counts_U[unit]
                to += 1
            to = start_2A[1, asked] + offsets_2AL[1, asked, layer]
            for pair in range(groups_4G[3, group], groups_4G[3, group + 1]):
                sent_P[to] = row_index_P[pair]
                to += 1

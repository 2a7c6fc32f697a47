"""Copies of units on hosts so that all hosts have the same work, from measured load. Pure NumPy.

Data on its way: load of each unit -> how many copies it gets (the hottest first) -> how many units of a layer each host
holds (as even as can be) -> layer by layer, units of several copies first, each copy to the least loaded host.
Like DeepSeek's EPLB, but never with two copies of a unit on one host.

Letters: L layers, R the largest number of routed experts in a layer, C copies of a unit, H hosts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NO_HOST = -1
#: Hosts whose loads differ by less than this share of a host's mean are equally good; what else speaks for one decides.
_NEAR = 0.02
#: A step's rows of one unit part no further to any use, and choosing takes longer with each copy.
MOST_COPIES = 8
#: Of the least loaded hosts so many are tried as partners of a swap.
_PARTNERS = 8


def balanced(
    num_routed: Sequence[int],
    load_LR: NDArray[np.float64],
    num_hosts: int,
    replicas: float = 0.0,
    one_index: bool = False,
    node_of_host: Sequence[str] | Sequence[int] | None = None,
) -> NDArray[np.int16]:
    """Return copies [L, R, C]: the hosts that hold each unit, its home first, -1 behind them.

    `num_routed`: routed experts of each layer. `load_LR`: each unit's work, of any scale. `replicas`: copies beyond one
    of each, as a share of all units. `node_of_host` [H]: copies of a unit lie on several nodes where there is room.
    With `one_index` units of one number lie on one host where that is as good as others. In a layer, and without
    `one_index` in all, hosts hold the same number of units, or one more.

    Worked example, one layer of 4 units with load [6, 1, 2, 3], two hosts of 3 units each (replicas 0.5): the spare
    copies go to unit 0 (6 a copy) and, as that is on both hosts now, to 3 (3 a copy); each host has load 3 + 1.5 of
    them. Units 2 and 1 go to hosts 0 and 1, which have 6.5 and 5.5: copies [[1, 0], [1, -1], [0, -1], [0, 1]]. The
    homes of 0 and 3 are those that even out homes alone: 3 + 2 and 6 + 1.
    """
    counts_LR = num_copies(num_routed, load_LR, num_hosts, replicas)
    copies = np.full((*load_LR.shape, int(counts_LR.max(initial=1))), NO_HOST, dtype=np.int16)
    node_H = np.unique(range(num_hosts) if node_of_host is None else node_of_host, return_inverse=True)[1]
    turn, held_RH = 0, np.zeros((load_LR.shape[1], num_hosts), dtype=bool)
    for layer, count in enumerate(num_routed):
        if not count:
            continue
        num_slots = int(counts_LR[layer].sum())
        room_H = num_slots // num_hosts + ((np.arange(num_hosts) - turn) % num_hosts < num_slots % num_hosts)
        each_R = load_LR[layer, :count] / counts_LR[layer, :count]
        before_RH, held_RH = held_RH & one_index, np.zeros_like(held_RH)
        held_RH[:count] = _pack(each_R, counts_LR[layer, :count], room_H, node_H, before_RH)
        _write(copies[layer], held_RH[:count], load_LR[layer, :count])
        turn = 0 if one_index else (turn + num_slots) % num_hosts
    return copies


def num_copies(
    num_routed: Sequence[int], load_LR: NDArray[np.float64], num_hosts: int, replicas: float
) -> NDArray[np.int64]:
    """How many copies each unit gets [L, R]: one, and of `replicas` times all units one more each time for the unit
    with the most load a copy. At most one a host, and `MOST_COPIES`.

    Example: load [[8, 3, 1]], two spare: [[3, 1, 1]], as 8 / 2 > 3.
    """
    counts_LR = (np.arange(load_LR.shape[1]) < np.asarray(num_routed)[:, None]).astype(np.int64)
    # Of equally loaded units, those of low number in all layers: so every layer has its share.
    hottest = [(-load_LR[layer, expert], expert, layer) for layer, expert in np.argwhere(counts_LR)]
    heapq.heapify(hottest)
    for _ in range(int(counts_LR.sum() * replicas + 1e-9)):
        while hottest and counts_LR[hottest[0][2], hottest[0][1]] >= min(num_hosts, MOST_COPIES):
            heapq.heappop(hottest)
        if not hottest:
            break
        _, expert, layer = hottest[0]
        counts_LR[layer, expert] += 1
        heapq.heapreplace(hottest, (-load_LR[layer, expert] / counts_LR[layer, expert], expert, layer))
    return counts_LR


def _pack(
    each_R: NDArray, counts_R: NDArray, room_H: NDArray, node_H: NDArray, before_RH: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which hosts hold which units of a layer [R, H]: so many copies of each, of so much load each; of hosts that are
    equally good those that hold the unit of the same number before."""
    num_hosts, near = len(room_H), _NEAR * float((each_R * counts_R).sum()) / len(room_H)
    held_RH = np.zeros((len(each_R), num_hosts), dtype=bool)
    load_H, room_H = np.zeros(num_hosts), room_H.copy()
    # Copies have the most to heed, so they come first; the small ones at the end even out what the large ones left.
    for unit in np.lexsort((-each_R, counts_R == 1)):
        for _ in range(counts_R[unit]):
            open_H = (room_H > 0) & ~held_RH[unit]
            if not open_H.any():
                _make_room(held_RH, load_H, room_H, each_R, unit)
                continue
            other = open_H & ~np.isin(node_H, node_H[held_RH[unit]])
            hosts = np.flatnonzero(other if other.any() else open_H)
            hosts = hosts[load_H[hosts] <= load_H[hosts].min() + near]
            host = hosts[np.lexsort((load_H[hosts], ~before_RH[unit, hosts]))[0]]
            held_RH[unit, host] = True
            load_H[host] += each_R[unit]
            room_H[host] -= 1
    _even_out(held_RH, load_H, each_R, node_H)
    return held_RH


def _make_room(held_RH: NDArray, load_H: NDArray, room_H: NDArray, each_R: NDArray, unit: int) -> None:
    """Whoever has room holds the unit already: move another unit there, of a host that does not, and take its place.

    There is one. Hosts have the same number of places, or one more; so a full host that holds less than the one with
    room would have at least two places fewer.
    """
    for host in np.flatnonzero(room_H > 0):
        for full in np.flatnonzero(~held_RH[unit]):
            others = np.flatnonzero(held_RH[:, full] & ~held_RH[:, host])
            if len(others):
                other = others[0]
                held_RH[other, [full, host]] = False, True
                held_RH[unit, full] = True
                load_H[host] += each_R[other]
                load_H[full] += each_R[unit] - each_R[other]
                room_H[host] -= 1
                return
    raise AssertionError("no host has room for a copy")


def _even_out(held_RH: NDArray, load_H: NDArray, each_R: NDArray, node_H: NDArray) -> None:
    """Swap units of the fullest host with others' while that makes it less full, and the other less full than it was;
    no copy goes to a node that has one."""
    num_on_RN = np.zeros((len(each_R), node_H.max() + 1), dtype=np.int64)
    np.add.at(num_on_RN.T, node_H, held_RH.T)
    for _ in range(4 * len(load_H)):
        most = int(load_H.argmax())
        best, swap = load_H[most] * (1 - 1e-9), None
        for host in np.argsort(load_H, kind="stable")[:_PARTNERS]:
            may_R = (num_on_RN[:, node_H[[most, host]]] == 0) | (node_H[most] == node_H[host])
            out = np.flatnonzero(held_RH[:, most] & ~held_RH[:, host] & may_R[:, 1])
            back = np.flatnonzero(held_RH[:, host] & ~held_RH[:, most] & may_R[:, 0])
            if not len(out) or not len(back):
                continue
            moved = each_R[out][:, None] - each_R[back]
            worst = np.maximum(load_H[most] - moved, load_H[host] + moved)
            if worst.min() < best:
                place = int(worst.argmin())
                best, swap = worst.flat[place], (host, out[place // len(back)], back[place % len(back)])
        if swap is None:
            return
        host, *units = swap
        for unit, giver, taker in zip(units, (most, host), (host, most), strict=True):
            held_RH[unit, [giver, taker]] = False, True
            np.add.at(num_on_RN[unit], node_H[[giver, taker]], [-1, 1])
            load_H[giver] -= each_R[unit]
            load_H[taker] += each_R[unit]


def _write(copies_RC: NDArray[np.int16], held_RH: NDArray[np.bool_], load_R: NDArray[np.float64]) -> None:
    """Write the hosts of each unit of a layer, first the home: of its hosts the one whose homes have the least load."""
    home_load_H = load_R[held_RH.sum(axis=1) == 1] @ held_RH[held_RH.sum(axis=1) == 1]
    for unit in np.lexsort((-load_R, held_RH.sum(axis=1) > 1)):
        hosts = np.flatnonzero(held_RH[unit])
        if len(hosts) > 1:
            home = hosts[home_load_H[hosts].argmin()]
            home_load_H[home] += load_R[unit]
            hosts = np.concatenate([[home], hosts[hosts != home]])
        copies_RC[unit, : len(hosts)] = hosts

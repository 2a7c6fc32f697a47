"""A few units at a time from one placement to a better one, while hosts serve. Pure NumPy.

Letters: L layers, R the largest number of routed experts in a layer, C copies of a unit, H hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pregate.cluster.balanced import NO_HOST
from pregate.cluster.placement import Placement


@dataclass(frozen=True)
class Move:
    """Host `target` loads the unit (-1: nobody does), and after that `source` gives it up (-1: nobody)."""

    layer: int
    expert: int
    source: int
    target: int


def slowest_load(placement: Placement, load_LR: NDArray[np.float64]) -> NDArray[np.float64]:
    """The load of each layer's most loaded host [L], where copies of a unit share its load.

    Example: units with load [4, 2, 2] on hosts [[0, 1], [0], [1]] load hosts with 2 + 2 and 2 + 2: [4].
    """
    held_LRH = _held(placement)
    each_LR = load_LR / np.maximum(held_LRH.sum(axis=2), 1)
    return np.einsum("lr,lrh->lh", each_LR, held_LRH).max(axis=1)


def moves(
    old: Placement, new: Placement, limit: int, load_LR: NDArray[np.float64], least_gain: float = 0.05
) -> list[Move]:
    """Return the next moves from `old` towards `new`, in order, at most `limit` of which load a unit: those first that
    take the most from a layer's most loaded host. Copies that are only given up come first, and free.

    None at all while `new` would not make the slowest hosts, layer by layer, faster by the share `least_gain`: loading
    costs, and measured load is never quite the same. While they are made no host holds more than it does now, or than
    the fullest of `new` and one unit.

    Example: loads [3, 3, 1, 1] on hosts [0, 0, 1, 1], and better [0, 1, 0, 1]: unit 1 to host 1, then 2 to host 0.
    """
    before, after = slowest_load(old, load_LR).sum(), slowest_load(new, load_LR).sum()
    if after > before * (1 - least_gain):
        return []
    given_up, to_load = _changes(old, new)
    held_LRH = _held(old)
    room = _held(new).sum(axis=(0, 1)).max() + 1
    for move in given_up:
        _apply(held_LRH, move)
    made: list[Move] = []
    while to_load and len(made) < limit:
        count_H = held_LRH.sum(axis=(0, 1))
        able = [m for m in to_load if count_H[m.target] < room]
        assert able, "hosts that are full have units to give to some that are not"
        best = max(able, key=lambda m: _gain(held_LRH[m.layer], load_LR[m.layer], m))
        _apply(held_LRH, best)
        to_load.remove(best)
        made.append(best)
    return given_up + made


def moved(placement: Placement, made: Sequence[Move]) -> Placement:
    """The placement after these moves, one version on. A home that goes leaves its place to the unit's new copy."""
    lists = [[[h for h in hosts if h != NO_HOST] for hosts in layer] for layer in placement.copies.tolist()]
    for move in made:
        hosts = lists[move.layer][move.expert]
        if move.source == NO_HOST:
            hosts.append(move.target)
        elif move.target == NO_HOST:
            hosts.remove(move.source)
        else:
            hosts[hosts.index(move.source)] = move.target
    width = max(1, *(len(hosts) for layer in lists for hosts in layer))
    copies = np.array([[h + [NO_HOST] * (width - len(h)) for h in layer] for layer in lists], dtype=np.int16)
    return Placement(placement.version + 1, placement.num_hosts, copies)


def _held(placement: Placement) -> NDArray[np.bool_]:
    """Which host holds which unit [L, R, H]."""
    return (placement.copies[..., None] == np.arange(placement.num_hosts)).any(axis=2)


def _changes(old: Placement, new: Placement) -> tuple[list[Move], list[Move]]:
    """What is only given up, and what is loaded, with what is given up for it where there is something."""
    lost_LRH, found_LRH = _held(old) & ~_held(new), _held(new) & ~_held(old)
    given_up, to_load = [], []
    for layer, expert in np.argwhere((lost_LRH | found_LRH).any(axis=2)).tolist():
        sources, targets = (np.flatnonzero(x[layer, expert]).tolist() for x in (lost_LRH, found_LRH))
        pairs = len(sources), len(targets)
        given_up += [Move(layer, expert, source, NO_HOST) for source in sources[pairs[1] :]]
        sources = sources[: pairs[1]] + [NO_HOST] * (pairs[1] - pairs[0])
        to_load += [Move(layer, expert, *ends) for ends in zip(sources, targets, strict=True)]
    return given_up, to_load


def _gain(held_RH: NDArray[np.bool_], load_R: NDArray[np.float64], move: Move) -> float:
    """How much less the layer's most loaded host has after a move; of equal ones, the move of the most load."""
    load_H = (load_R / np.maximum(held_RH.sum(axis=1), 1)) @ held_RH
    row_H = held_RH[move.expert]
    after_H = row_H.copy()
    after_H[move.target] = True
    if move.source != NO_HOST:
        after_H[move.source] = False
    load = load_R[move.expert]
    changed_H = load_H - row_H * load / max(1, row_H.sum()) + after_H * load / after_H.sum()
    return float(load_H.max() - changed_H.max() + 1e-6 * load)


def _apply(held_LRH: NDArray[np.bool_], move: Move) -> None:
    for host, value in ((move.target, True), (move.source, False)):
        if host != NO_HOST:
            held_LRH[move.layer, move.expert, host] = value

"""Which host serves which unit while some are lost, and in a step which of a unit's copies. Pure; what a step waits for
is compiled (`share_loops.py`).

Shape letters: H hosts, L layers, R routed experts, C copies of a unit.
"""

from __future__ import annotations

import numpy as np

from pregate.router.engine.share_loops import settle, spread

#: Where no host is: units that do not exist, and the end of a list of copies.
NO_HOST = -1
#: So often a unit of a layer's slowest host is moved, whole, or a part of its rows
_WHOLE_ROUNDS, _SHARED_ROUNDS = 2, 12


def adopt(copies_LRC: np.ndarray, alive_H: np.ndarray) -> np.ndarray:
    """Return copies int16 [L, R, C] on living hosts alone, the first of each first: a unit whose copies are all lost
    gets a host that lives, in every layer the one with the fewest units, of several such the one with fewest in all.

    Depends on its arguments alone, so that as long as the same hosts live a unit is served by the same one, which reads
    it once. Example: one layer of 4 units with homes [0, 1, 0, 2], host 0 lost: [1, 1, 2, 2].
    """
    living = np.flatnonzero(alive_H)
    assert len(living), "no host lives"
    lives_LRC = (copies_LRC >= 0) & alive_H[copies_LRC]
    order_LRC = np.argsort(~lives_LRC, axis=2, kind="stable")
    adopted_LRC = np.take_along_axis(np.where(lives_LRC, copies_LRC, NO_HOST), order_LRC, axis=2)
    orphans = np.argwhere((copies_LRC[..., 0] >= 0) & ~lives_LRC.any(axis=2))
    num_units_LH = np.stack([(adopted_LRC[..., 0] == host).sum(axis=1) for host in range(len(alive_H))], axis=1)
    total_H = num_units_LH.sum(axis=0)
    for layer, expert in orphans:
        host = living[np.lexsort((total_H[living], num_units_LH[layer, living]))[0]]
        adopted_LRC[layer, expert, 0] = host
        num_units_LH[layer, host] += 1
        total_H[host] += 1
    return adopted_LRC


def choose_hosts(
    copies_LRC: np.ndarray,
    rows_LR: np.ndarray | None = None,
    num_hosts: int = 0,
    unit_s: np.ndarray | float = 0.0,
    row_s: np.ndarray | float = 1.0,
    busy_H: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return int16 [L, R]: the host that serves each unit in a step, one of its copies, so that the slowest host of
    each layer is fast; the first of its copies where it has no rows, or `rows_LR`, a step's rows, is not given.

    All rows of a unit go to one host, which takes `unit_s` for the unit (reading it, or loading it where it is not
    resident) and `row_s` for each row; both may be given for each copy [L, R, C]. `busy_H`: seconds before each host
    begins. Greedy: the most work first, to whoever would be done with it first; then, of the slowest host, whatever
    another would be done with earlier.

    Example: 4 units with copies [[0, 1], [0], [1, 0], [1]] and rows [[5, 4, 3, 1]] of a second each. Units 1 and 3 have
    no choice; 5 rows are done after 6 s on host 1, not 9 on host 0; 3 after 7 s on host 0: hosts [[1, 0, 0, 1]].
    """
    if rows_LR is None or copies_LRC.shape[2] == 1:
        return copies_LRC[..., 0]
    rows_LRC = _settled(copies_LRC, rows_LR, num_hosts, unit_s, row_s, busy_H, whole=True)
    return np.take_along_axis(copies_LRC, rows_LRC.argmax(axis=2)[..., None], axis=2)[..., 0]


def share_rows(
    copies_LRC: np.ndarray,
    rows_LR: np.ndarray,
    num_hosts: int,
    unit_s: np.ndarray | float = 0.0,
    row_s: np.ndarray | float = 1.0,
    busy_H: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return how many of each unit's rows go to each of its copies, int32 [L, R, C]: as `choose_hosts`, but a unit's
    rows may part where reading it twice costs less than waiting. A step of many rows is as fast as its hosts' mean
    even where one unit has more than that.

    Example: rows [[9, 1]] of units with copies [[0, 1], [1]] part so that both hosts have five: [[[5, 4], [1, 0]]];
    with 9 s for reading a unit they do not: [[[9, 0], [1, 0]]].
    """
    return _settled(copies_LRC, rows_LR, num_hosts, unit_s, row_s, busy_H, whole=False)


def _settled(
    copies_LRC: np.ndarray,
    rows_LR: np.ndarray,
    num_hosts: int,
    unit_s: np.ndarray | float,
    row_s: np.ndarray | float,
    busy_H: np.ndarray | float,
    whole: bool,
) -> np.ndarray:
    """Return the rows of each copy [L, R, C]."""
    shape, rows_LRC = copies_LRC.shape, np.zeros(copies_LRC.shape, dtype=np.int32)
    copies_LRC = np.ascontiguousarray(copies_LRC, dtype=np.int16)
    rows_LR = np.ascontiguousarray(rows_LR, dtype=np.int64)
    seconds = [np.broadcast_to(np.asarray(each, dtype=np.float64), shape) for each in (unit_s, row_s)]
    if rows_LR.shape != shape[:2] or copies_LRC.max(initial=-1) >= num_hosts:  # compiled loops look at no bounds
        raise ValueError(f"copies {shape} on {num_hosts} hosts do not fit rows {rows_LR.shape}")
    time_LH = np.zeros((shape[0], num_hosts)) + busy_H
    rounds = _WHOLE_ROUNDS if whole else _SHARED_ROUNDS
    settle(copies_LRC, rows_LR, *seconds, time_LH, rounds, whole, rows_LRC)
    return rows_LRC


def hosts_of_pairs(ids_TLK: np.ndarray, copies_LRC: np.ndarray, rows_LRC: np.ndarray) -> np.ndarray:
    """Return the host of each token's experts int16 [T, L, K], for `make_plan`: of each unit the first tokens go to its
    first copy, as many as `share_rows` says, and so on. -1 where a token has no expert."""
    hosts_TLK = np.empty(ids_TLK.shape, dtype=np.int16)
    ids_TLK, copies_LRC = (np.ascontiguousarray(each, dtype=np.int16) for each in (ids_TLK, copies_LRC))
    if ids_TLK.shape[1] != len(copies_LRC) or ids_TLK.max(initial=-1) >= copies_LRC.shape[1]:
        raise ValueError(f"paths {ids_TLK.shape} go beyond the units of {copies_LRC.shape}")
    spread(ids_TLK, copies_LRC, rows_LRC, hosts_TLK)
    return hosts_TLK

"""Which host serves which unit while some are lost, and in a step which of a unit's copies. Pure, NumPy only.

Shape letters: H hosts, L layers, R routed experts, C copies of a unit.
"""

from __future__ import annotations

import numpy as np

#: Where no host is: units that do not exist, and the end of a list of copies.
NO_HOST = -1
#: So often a unit of every layer's slowest host is moved, whole, or a part of its rows: each time is a tenth of a
#: millisecond and more, the first gain most.
_WHOLE_ROUNDS, _SHARED_ROUNDS = 2, 12
_LEAST_GAIN = 0.003


def adopt(copies_LRC: np.ndarray, alive_H: np.ndarray) -> np.ndarray:
    """Return copies int16 [L, R, C] on living hosts alone, the first of each first: a unit whose copies are all lost
    gets a host that lives, in every layer the one with the fewest units.

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
    for layer, expert in orphans:
        host = living[np.argmin(num_units_LH[layer, living])]
        adopted_LRC[layer, expert, 0] = host
        num_units_LH[layer, host] += 1
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
    rows_LRC = _Shares(copies_LRC, rows_LR, num_hosts, unit_s, row_s, busy_H).settle(_WHOLE_ROUNDS, whole=True)
    return np.take_along_axis(copies_LRC, rows_LRC.argmax(axis=2)[..., None], axis=2)[..., 0]


def share_rows(
    copies_LRC: np.ndarray,
    rows_LR: np.ndarray,
    num_hosts: int,
    unit_s: np.ndarray | float = 0.0,
    row_s: np.ndarray | float = 1.0,
    busy_H: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return how many of each unit's rows go to each of its copies, int [L, R, C]: as `choose_hosts`, but a unit's rows
    may part where reading it twice costs less than waiting. A step of many rows is as fast as its hosts' mean
    even where one unit has more than that.

    Example: rows [[9, 1]] of units with copies [[0, 1], [1]] part so that both hosts have five: [[[5, 4], [1, 0]]];
    with 9 s for reading a unit they do not: [[[9, 0], [1, 0]]].
    """
    shares = _Shares(copies_LRC, rows_LR, num_hosts, unit_s, row_s, busy_H)
    return shares.settle(_SHARED_ROUNDS, whole=False)


def hosts_of_pairs(ids_TLK: np.ndarray, copies_LRC: np.ndarray, rows_LRC: np.ndarray) -> np.ndarray:
    """Return the host of each token's experts int16 [T, L, K], for `make_plan`: of each unit the first tokens go to its
    first copy, as many as `share_rows` says, and so on. -1 where a token has no expert."""
    num_layers, num_routed, num_copies = copies_LRC.shape
    copies_X, rows_X = copies_LRC.reshape(-1), rows_LRC.reshape(-1)
    asked_N = np.flatnonzero(rows_X)  # copies that have rows, of one unit side by side
    unit_N = asked_N // num_copies
    hosts_U = copies_LRC[..., 0].reshape(-1).copy()
    hosts_U[unit_N] = copies_X[asked_N]
    parted_U = np.zeros(len(hosts_U), dtype=bool)
    parted_U[unit_N[1:][unit_N[1:] == unit_N[:-1]]] = True
    unit_P = (ids_TLK + (np.arange(num_layers) * num_routed)[:, None]).reshape(-1)
    real_P = (ids_TLK >= 0).reshape(-1)
    hosts_P, parted_P = hosts_U.take(unit_P), parted_U.take(unit_P) & real_P
    hosts_P[~real_P] = NO_HOST
    pairs = np.flatnonzero(parted_P)
    parts_N = asked_N[parted_U[unit_N]]
    hosts_P[pairs[np.argsort(unit_P[pairs], kind="stable")]] = np.repeat(copies_X[parts_N], rows_X[parts_N])
    return hosts_P.reshape(ids_TLK.shape)


class _Shares:
    """The rows of units that have a choice, all layers side by side: M is the most such units of a layer; a column
    beyond has no rows. A copy beyond a unit's own is on host H, which is never done.

    `time_LH`: when each host is done with a layer. `rows_LMC`: what each copy computes.
    """

    def __init__(
        self,
        copies_LRC: np.ndarray,
        rows_LR: np.ndarray,
        num_hosts: int,
        unit_s: np.ndarray | float,
        row_s: np.ndarray | float,
        busy_H: np.ndarray | float,
    ) -> None:
        num_layers, num_routed, num_copies = self._shape = copies_LRC.shape
        unit_s, row_s = np.broadcast_to(unit_s, self._shape), np.broadcast_to(row_s, self._shape)
        used_N = np.flatnonzero(rows_LR)
        layer_N, unit_N, rows_N = used_N // num_routed, used_N % num_routed, rows_LR.reshape(-1)[used_N]
        cost_N = unit_s[layer_N, unit_N, 0] + rows_N * row_s[layer_N, unit_N, 0]
        copies_NC = copies_LRC.reshape(-1, num_copies)[used_N]
        open_N = copies_NC[:, 1] >= 0 if num_copies > 1 else np.zeros(len(used_N), dtype=bool)
        only = ~open_N
        self._fixed = used_N[only] * num_copies, rows_N[only]
        place, size = layer_N[only] * (num_hosts + 1) + copies_NC[only, 0], num_layers * (num_hosts + 1)
        self.time_LH = np.bincount(place, cost_N[only], size).astype(np.float64).reshape(-1, num_hosts + 1)
        self.time_LH[:, :num_hosts] += busy_H
        self.time_LH[:, num_hosts] = np.inf
        self._layers = np.arange(num_layers)
        order = np.flatnonzero(open_N)
        order = order[np.lexsort((-cost_N[order], layer_N[order]))]  # equal ones by number
        layer, unit, rows = layer_N[order], unit_N[order], rows_N[order]
        count_L = np.bincount(layer, minlength=num_layers)
        column = np.arange(len(order)) - (count_L.cumsum() - count_L)[layer]
        self._units, self._columns = used_N[order], (layer, column)
        shape = (num_layers, int(count_L.max(initial=0)), num_copies)
        self.copies_LMC = np.full(shape, num_hosts, dtype=np.int64)
        self.copies_LMC[..., :1] = 0
        self.copies_LMC[self._columns] = np.where(copies_NC[order] < 0, num_hosts, copies_NC[order])
        self.rows_LMC, self._unit_s_LMC, self._row_s_LMC = (
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape),
            np.ones(shape),
        )
        self.rows_LMC[..., 0][self._columns] = rows
        self._unit_s_LMC[self._columns], self._row_s_LMC[self._columns] = unit_s[layer, unit], row_s[layer, unit]

    def settle(self, rounds: int, whole: bool) -> np.ndarray:
        """Place all and improve on it so often at most; return the rows of each copy [L, R, C]."""
        if self.rows_LMC.size:
            self._place()
        for _ in range(rounds if self.rows_LMC.size else 0):
            if self._improve(whole) < _LEAST_GAIN:
                break
        rows_LRC = np.zeros(self._shape, dtype=np.int64)
        at, rows_N = self._fixed
        rows_LRC.reshape(-1)[at] = rows_N
        rows_LRC.reshape(-1, self._shape[2])[self._units] = self.rows_LMC[self._columns]
        return rows_LRC

    def _place(self) -> None:
        """Give unit after unit, of every layer one, to the host that would be done with it first."""
        num_layers, num_open, num_copies = self.rows_LMC.shape
        time, first_L = self.time_LH.reshape(-1), self._layers * num_copies
        place_LMC = self.copies_LMC + (self._layers * self.time_LH.shape[1])[:, None, None]
        cost_LMC = self._unit_s_LMC + self.rows_LMC[..., :1] * self._row_s_LMC
        place_MX, cost_MX = (x.swapaxes(0, 1).reshape(num_open, -1) for x in (place_LMC, cost_LMC))
        copy_ML = np.empty((num_open, num_layers), dtype=np.int64)
        for place_X, cost_X, copy_L in zip(place_MX, cost_MX, copy_ML, strict=True):
            done_X = time.take(place_X) + cost_X
            done_X.reshape(num_layers, num_copies).argmin(axis=1, out=copy_L)
            best_L = first_L + copy_L
            time[place_X.take(best_L)] = done_X.take(best_L)
        rows_LM1 = self.rows_LMC[..., :1].copy()
        self.rows_LMC[:] = np.where(np.arange(num_copies) == copy_ML.T[..., None], rows_LM1, 0)

    def _improve(self, whole: bool) -> float:
        """Move rows of a unit, or all of them, from each layer's slowest host to where both are done earlier than that
        host was. Return the share of the time that this is thought to gain."""
        time_LH = self.time_LH[:, :-1]
        slowest_L = time_LH.argmax(axis=1)
        before_L = time_LH[self._layers, slowest_L]
        # Of each layer's slowest host the units that have a choice: layer, column, and which copy it is.
        layer, column, here = np.nonzero((self.copies_LMC == slowest_L[:, None, None]) & (self.rows_LMC > 0))
        if not len(layer):
            return 0.0
        unit, number_N = (layer, column), np.arange(len(layer))
        hosts_NC, rows_NC, row_s_NC = self.copies_LMC[unit], self.rows_LMC[unit], self._row_s_LMC[unit]
        before_N1, has_N1 = before_L[layer][:, None], rows_NC[number_N, here][:, None]
        begin_NC = self.time_LH[layer[:, None], hosts_NC] + self._unit_s_LMC[unit] * (rows_NC == 0)
        row_s_N1, unit_s_N1 = row_s_NC[number_N, here][:, None], self._unit_s_LMC[unit][number_N, here][:, None]
        moved_NC = np.broadcast_to(has_N1, hosts_NC.shape)
        if not whole:
            even_NC = (before_N1 - begin_NC) / (row_s_N1 + row_s_NC)
            moved_NC = np.minimum(has_N1, even_NC.clip(min=0)).astype(np.int64)
        there_NC = begin_NC + moved_NC * row_s_NC
        less_NC = moved_NC * row_s_N1 + unit_s_N1 * (moved_NC == has_N1)
        after_NC = np.maximum(there_NC, before_N1 - less_NC)
        after_NC[(moved_NC == 0) | (np.arange(hosts_NC.shape[1]) == here[:, None])] = np.inf
        copy_N = after_NC.argmin(axis=1)
        after_N = after_NC[number_N, copy_N]
        order = np.lexsort((after_N, layer))
        best = order[np.flatnonzero(np.diff(layer, prepend=-1))]  # of each layer; layers lie in order in both
        best = best[after_N[best] < before_L[layer[best]] * (1 - 1e-9)]
        layer, column, here, there = layer[best], column[best], here[best], copy_N[best]
        self.time_LH[layer, slowest_L[layer]] -= less_NC[best, there]
        self.time_LH[layer, hosts_NC[best, there]] = there_NC[best, there]
        self.rows_LMC[layer, column, there] += moved_NC[best, there]
        self.rows_LMC[layer, column, here] -= moved_NC[best, there]
        slowest_s = float(before_L.sum())
        return (slowest_s - float(time_LH.max(axis=1).sum())) / slowest_s

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
    layers_L1 = np.arange(len(copies_LRC))[:, None]
    copy_LR = rows_LRC.argmax(axis=2)
    hosts_LR = np.take_along_axis(copies_LRC, copy_LR[..., None], axis=2)[..., 0]
    hosts_TLK = np.where(ids_TLK >= 0, hosts_LR[layers_L1, ids_TLK], np.int16(NO_HOST))
    parts_LR = (rows_LRC > 0).sum(axis=2) > 1
    token, layer, column = np.nonzero(parts_LR[layers_L1, ids_TLK] & (ids_TLK >= 0))
    unit = layer * copies_LRC.shape[1] + ids_TLK[token, layer, column]
    order = np.argsort(unit, kind="stable")
    start = np.searchsorted(unit[order], unit[order])
    until_PC = rows_LRC.cumsum(axis=2).reshape(-1, rows_LRC.shape[2])[unit[order]]
    copy = (np.arange(len(order)) - start >= until_PC.T).sum(axis=0)
    parted = token[order], layer[order], column[order]
    hosts_TLK[parted] = copies_LRC.reshape(-1, copies_LRC.shape[2])[unit[order], copy]
    return hosts_TLK


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
        num_layers, shape = len(copies_LRC), copies_LRC.shape
        unit_s, row_s = np.broadcast_to(unit_s, shape), np.broadcast_to(row_s, shape)
        open_LR = (rows_LR > 0) & (copies_LRC[..., 1] >= 0 if shape[2] > 1 else False)
        self._rows_LRC = np.zeros(shape, dtype=np.int64)
        self._rows_LRC[..., 0] = rows_LR
        self._time(copies_LRC, (rows_LR > 0) & ~open_LR, unit_s, row_s, num_hosts)
        self.time_LH[:, :num_hosts] += busy_H
        self._layers = np.arange(num_layers)
        layer, unit = np.nonzero(open_LR)
        order = np.lexsort((-(unit_s[..., 0] + rows_LR * row_s[..., 0])[layer, unit], layer))  # equal ones by number
        layer, unit = layer[order], unit[order]
        count_L = np.bincount(layer, minlength=num_layers)
        column = np.arange(len(order)) - (count_L.cumsum() - count_L)[layer]
        self._units, self._columns = (layer, unit), (layer, column)
        shape = (num_layers, int(count_L.max(initial=0)), shape[2])
        self.copies_LMC = np.full(shape, num_hosts, dtype=np.int64)
        self.copies_LMC[..., :1] = 0
        self.copies_LMC[self._columns] = np.where(copies_LRC[layer, unit] < 0, num_hosts, copies_LRC[layer, unit])
        self.rows_LMC, self._unit_s_LMC, self._row_s_LMC = (
            np.zeros(shape, dtype=np.int64),
            np.zeros(shape),
            np.ones(shape),
        )
        self.rows_LMC[..., 0][self._columns] = rows_LR[layer, unit]
        self._unit_s_LMC[self._columns], self._row_s_LMC[self._columns] = unit_s[layer, unit], row_s[layer, unit]

    def _time(
        self, copies_LRC: np.ndarray, fixed_LR: np.ndarray, unit_s: np.ndarray, row_s: np.ndarray, num_hosts: int
    ) -> None:
        """When hosts are done with what has no choice."""
        layer, unit = np.nonzero(fixed_LR)
        cost = unit_s[layer, unit, 0] + self._rows_LRC[layer, unit, 0] * row_s[layer, unit, 0]
        place, size = layer * (num_hosts + 1) + copies_LRC[layer, unit, 0], len(copies_LRC) * (num_hosts + 1)
        self.time_LH = np.bincount(place, cost, size).astype(np.float64).reshape(-1, num_hosts + 1)
        self.time_LH[:, num_hosts] = np.inf

    def settle(self, rounds: int, whole: bool) -> np.ndarray:
        """Place all and improve on it so often at most; return the rows of each copy [L, R, C]."""
        if self.rows_LMC.size:
            self._place()
        for _ in range(rounds if self.rows_LMC.size else 0):
            if self._improve(whole) < _LEAST_GAIN:
                break
        self._rows_LRC[self._units] = self.rows_LMC[self._columns]
        return self._rows_LRC

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

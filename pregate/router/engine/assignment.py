"""Which host serves which unit while some are lost, and in a step which of a unit's copies. Pure, NumPy only.

Shape letters: H hosts, L layers, R routed experts, C copies of a unit.
"""

from __future__ import annotations

import numpy as np

#: Where no host is: units that do not exist, and the end of a list of copies.
NO_HOST = -1
#: So often a unit of every layer's slowest host is moved: each time is a tenth of a millisecond, the first gain most.
_ROUNDS = 4


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
    hosts_LR = copies_LRC[..., 0].copy()
    if rows_LR is None or copies_LRC.shape[2] == 1:
        return hosts_LR
    chosen = _Chosen(copies_LRC, rows_LR, num_hosts, unit_s, row_s, busy_H)
    if chosen.num_open:
        chosen.place()
        for _ in range(_ROUNDS):
            if not chosen.improve():
                break
        hosts_LR[chosen.layer_N, chosen.unit_N] = chosen.hosts()
    return hosts_LR


class _Chosen:
    """The units that have a choice, all layers side by side: M is the most of a layer; a column beyond costs nothing.

    `time_LH` is when each host is done with a layer; hosts beyond a unit's copies are never done (column H).
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
        num_layers = len(copies_LRC)
        cost_LRC = np.broadcast_to(unit_s + rows_LR[..., None] * row_s, copies_LRC.shape)
        open_LR = (copies_LRC[..., 1] >= 0) & (rows_LR > 0)
        self.time_LH = np.zeros((num_layers, num_hosts + 1))
        self.time_LH[:, :num_hosts] = busy_H
        self.time_LH[:, num_hosts] = np.inf
        layer, unit = np.nonzero((rows_LR > 0) & ~open_LR)
        place = layer * (num_hosts + 1) + copies_LRC[layer, unit, 0]
        self.time_LH += np.bincount(place, cost_LRC[layer, unit, 0], self.time_LH.size).reshape(self.time_LH.shape)
        layer, unit = np.nonzero(open_LR)
        order = np.lexsort((-cost_LRC[layer, unit, 0], layer))  # ties by number, so that equal steps are equal
        self.layer_N, self.unit_N = layer[order], unit[order]
        count_L = np.bincount(layer, minlength=num_layers)
        self.num_open = int(count_L.max(initial=0))
        self.column_N = np.arange(len(order)) - (count_L.cumsum() - count_L)[self.layer_N]
        shape = (num_layers, self.num_open, copies_LRC.shape[2])
        self.copies_LMC = np.full(shape, num_hosts, dtype=np.int64)
        hosts_NC = copies_LRC[self.layer_N, self.unit_N]
        self.copies_LMC[self.layer_N, self.column_N] = np.where(hosts_NC < 0, num_hosts, hosts_NC)
        self.copies_LMC[..., 0][self.copies_LMC[..., 0] == num_hosts] = 0  # columns that hold no unit
        self.cost_LMC = np.zeros(shape)
        self.cost_LMC[self.layer_N, self.column_N] = cost_LRC[self.layer_N, self.unit_N]
        self.copy_LM = np.zeros(shape[:2], dtype=np.int64)
        self._layers = np.arange(num_layers)

    def place(self) -> None:
        """Give each unit to the host that would be done with it first, in all layers at once."""
        layers = self._layers
        for column in range(self.num_open):
            hosts_LC = self.copies_LMC[:, column]
            done_LC = self.time_LH[layers[:, None], hosts_LC] + self.cost_LMC[:, column]
            copy_L = done_LC.argmin(axis=1)
            self.copy_LM[:, column] = copy_L
            self.time_LH[layers, hosts_LC[layers, copy_L]] = done_LC[layers, copy_L]

    def improve(self) -> bool:
        """Move a unit of each layer's slowest host to where both are done earlier than that host is; False where no
        layer has one."""
        layers, num_hosts = self._layers, self.time_LH.shape[1] - 1
        slowest_L = self.time_LH[:, :num_hosts].argmax(axis=1)
        before_L = self.time_LH[layers, slowest_L]
        here_LM = np.take_along_axis(self.copies_LMC, self.copy_LM[..., None], axis=2)[..., 0]
        cost_LM = np.take_along_axis(self.cost_LMC, self.copy_LM[..., None], axis=2)[..., 0]
        there_LMC = self.time_LH[layers[:, None, None], self.copies_LMC] + self.cost_LMC
        there_LMC[(self.copies_LMC == here_LM[..., None]) | (here_LM != slowest_L[:, None])[..., None]] = np.inf
        after_LMC = np.maximum(there_LMC, (before_L[:, None] - cost_LM)[..., None])
        flat_LN = after_LMC.reshape(len(layers), -1)
        best_L = flat_LN.argmin(axis=1)
        moves = np.flatnonzero(flat_LN[layers, best_L] < before_L * (1 - 1e-9))
        column, copy = np.divmod(best_L[moves], self.copies_LMC.shape[2])
        self.time_LH[moves, slowest_L[moves]] -= cost_LM[moves, column]
        self.time_LH[moves, self.copies_LMC[moves, column, copy]] = there_LMC[moves, column, copy]
        self.copy_LM[moves, column] = copy
        return len(moves) > 0

    def hosts(self) -> np.ndarray:
        """The hosts of the units `unit_N` of layers `layer_N`."""
        copy_N = self.copy_LM[self.layer_N, self.column_N]
        return self.copies_LMC[self.layer_N, self.column_N, copy_N]

"""Which host serves which unit while some are lost, and in a step which of a unit's copies. Pure, NumPy only.

Shape letters: H hosts, L layers, R routed experts, C copies of a unit.
"""

from __future__ import annotations

import numpy as np

#: Where no host is: units that do not exist, and the end of a list of copies.
NO_HOST = -1


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


def choose_hosts(copies_LRC: np.ndarray) -> np.ndarray:
    """Return int16 [L, R]: the host that serves each unit in a step, the first of its copies."""
    return copies_LRC[..., 0]

"""The loops that choose who computes a step's rows, compiled: what they decide `assignment.py` says.

Shape letters: T tokens, L layers, K experts per token, R routed experts, C copies of a unit, H hosts, O units of
a layer that have rows and a choice of hosts.
"""

from __future__ import annotations

import numpy as np

from pregate.base.compiled import compiled, inlined

#: Sums of seconds are made in this order, so that a choice is the same wherever it is made.
_EXACT = frozenset[str]()
#: Types of what is only read, and may be a view of a message.
_IDS, _ROWS = "Array(i2, 3, 'C', readonly=True)", "Array(i8, 2, 'C', readonly=True)"
#: Seconds of copies are most often one number, broadcast: written out, they are megabytes at a thousand hosts.
_SECONDS = "Array(f8, 3, 'A', readonly=True)"


@inlined(_EXACT)
def _sort_by_cost(units_O: np.ndarray, cost_O: np.ndarray) -> None:
    """Shell's sort of both, most work first, equal ones by number: NumPy's own takes four seconds to compile.

    Example: units [3, 5, 8], cost [1, 4, 4]: units [5, 8, 3].
    """
    for gap in (57, 23, 10, 4, 1):
        for n in range(gap, len(units_O)):
            unit, cost, to = units_O[n], cost_O[n], n
            while to >= gap:
                other, others = units_O[to - gap], cost_O[to - gap]
                if others > cost or (others == cost and other < unit):
                    break
                units_O[to], cost_O[to] = other, others
                to -= gap
            units_O[to], cost_O[to] = unit, cost


@inlined(_EXACT)
def _place(
    copies_RC: np.ndarray, rows_R: np.ndarray, unit_s_RC: np.ndarray, row_s_RC: np.ndarray, time_H: np.ndarray,
    rows_RC: np.ndarray, units_O: np.ndarray, cost_O: np.ndarray,
) -> int:  # fmt: skip
    """Give units of one copy to their hosts, then the others, most work first, to who would be done with them first.
    Writes the others in that order, and returns how many they are."""
    num = 0
    for unit in range(len(rows_R)):
        rows = rows_R[unit]
        if rows:
            cost = unit_s_RC[unit, 0] + rows * row_s_RC[unit, 0]
            if copies_RC.shape[1] > 1 and copies_RC[unit, 1] >= 0:
                units_O[num], cost_O[num] = unit, cost
                num += 1
            else:
                time_H[copies_RC[unit, 0]] += cost
                rows_RC[unit, 0] = rows
    _sort_by_cost(units_O[:num], cost_O[:num])
    for unit in units_O[:num]:
        best, best_s = 0, np.inf
        for copy in range(copies_RC.shape[1]):
            host = copies_RC[unit, copy]
            if host < 0:
                break
            done_s = time_H[host] + unit_s_RC[unit, copy] + rows_R[unit] * row_s_RC[unit, copy]
            if done_s < best_s:
                best, best_s = copy, done_s
        time_H[copies_RC[unit, best]] = best_s
        rows_RC[unit, best] = rows_R[unit]
    return num


@inlined(_EXACT)
def _improve(
    copies_RC: np.ndarray, unit_s_RC: np.ndarray, row_s_RC: np.ndarray, time_H: np.ndarray, rows_RC: np.ndarray,
    units_O: np.ndarray, slowest: int, whole: bool,
) -> bool:  # fmt: skip
    """Move rows of a unit, or all of them, from the slowest host to where both are done earlier than that was; the
    best of such moves. Returns whether there was one."""
    before_s, best_s = time_H[slowest], time_H[slowest] * (1 - 1e-9)
    best_unit, best_here, best_there, best_rows, best_there_s, best_less_s = -1, 0, 0, 0, 0.0, 0.0
    for unit in units_O:
        here = 0
        while here < copies_RC.shape[1] and copies_RC[unit, here] != slowest:
            here += 1
        if here == copies_RC.shape[1] or not rows_RC[unit, here]:
            continue
        for there in range(copies_RC.shape[1]):
            host = copies_RC[unit, there]
            if host < 0:
                break
            begin_s = time_H[host] + (0.0 if rows_RC[unit, there] else unit_s_RC[unit, there])
            rows = rows_RC[unit, here]
            if not whole:
                even = (before_s - begin_s) / (row_s_RC[unit, here] + row_s_RC[unit, there])
                rows = min(rows, np.int64(max(even, 0.0)))
            if there == here or not rows:
                continue
            there_s = begin_s + rows * row_s_RC[unit, there]
            less_s = rows * row_s_RC[unit, here] + (unit_s_RC[unit, here] if rows == rows_RC[unit, here] else 0.0)
            after_s = max(there_s, before_s - less_s)
            if after_s < best_s:
                best_s, best_unit, best_here, best_there, best_rows = after_s, unit, here, there, rows
                best_there_s, best_less_s = there_s, less_s
    if best_unit < 0:
        return False
    time_H[slowest] -= best_less_s
    time_H[copies_RC[best_unit, best_there]] = best_there_s
    rows_RC[best_unit, best_there] += best_rows
    rows_RC[best_unit, best_here] -= best_rows
    return True


@compiled(f"void({_IDS}, {_ROWS}, {_SECONDS}, {_SECONDS}, f8[:,::1], i8, b1, i4[:,:,::1])", _EXACT)
def settle(
    copies_LRC: np.ndarray,
    rows_LR: np.ndarray,
    unit_s_LRC: np.ndarray,
    row_s_LRC: np.ndarray,
    time_LH: np.ndarray,
    rounds: int,
    whole: bool,
    rows_LRC: np.ndarray,
) -> None:
    """Place all and improve on it, so often at most in each layer; write the rows of each copy over zeros. `time_LH`:
    when hosts begin with a layer, and when they are done with it afterwards."""
    num_layers, num_routed, _ = copies_LRC.shape
    units_O, cost_O = np.empty(num_routed, np.int64), np.empty(num_routed)
    for layer in range(num_layers):
        copies, unit_s, row_s = copies_LRC[layer], unit_s_LRC[layer], row_s_LRC[layer]
        time_H, rows_RC = time_LH[layer], rows_LRC[layer]
        num = _place(copies, rows_LR[layer], unit_s, row_s, time_H, rows_RC, units_O, cost_O)
        for _ in range(rounds if num else 0):
            slowest = 0
            for host in range(1, len(time_H)):
                if time_H[host] > time_H[slowest]:
                    slowest = host
            if not _improve(copies, unit_s, row_s, time_H, rows_RC, units_O[:num], slowest, whole):
                break


@compiled(f"void({_IDS}, {_IDS}, i4[:,:,::1], i2[:,:,::1])", _EXACT)
def spread(ids_TLK: np.ndarray, copies_LRC: np.ndarray, rows_LRC: np.ndarray, hosts_TLK: np.ndarray) -> None:
    """Write the host of each token's experts: of each unit the first tokens' is its first copy, as many as that has
    rows, and so on; -1 where there is no expert."""
    num_tokens, num_layers, k_max = ids_TLK.shape
    _, num_routed, num_copies = rows_LRC.shape
    copy_LR, used_LR = np.zeros(rows_LRC.shape[:2], np.int32), np.zeros(rows_LRC.shape[:2], np.int32)
    for token in range(num_tokens):
        for layer in range(num_layers):
            for column in range(k_max):
                unit = ids_TLK[token, layer, column]
                hosts_TLK[token, layer, column] = -1
                if unit < 0 or unit >= num_routed:
                    continue
                copy = copy_LR[layer, unit]
                while copy < num_copies - 1 and used_LR[layer, unit] == rows_LRC[layer, unit, copy]:
                    copy += 1
                    used_LR[layer, unit] = 0
                copy_LR[layer, unit] = copy
                used_LR[layer, unit] += 1
                hosts_TLK[token, layer, column] = copies_LRC[layer, unit, copy]

"""Balanced assignment: rows to columns of equal size at the least total cost, exact and fast when columns are few.

Shape letters: N rows, R columns, M rows now in one column.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_GRID_BITS = 52  # of the largest cost difference: what a float64 holds
_FAR = np.int64(2**61)  # above the cost of any chain of moves; two of them still fit an int64
_THINNING = 5  # prices are first found on every fifth row; odd, as periods of rows tend to be even
_SWEEPS = 5


def balanced_assignment(cost_NR: np.ndarray, size: int) -> np.ndarray:
    """Assign each of N rows to one of R columns, `size` rows each, at the least total cost; returns int64 [N].

    Exact for costs rounded to 2**-52 of the largest difference within a row (fewer bits from 256 columns on): the
    total is above the least by at most a few such roundings a row. Memory N * R; the square assignment problem it
    replaces needs N * N. Deterministic: integers, a fixed order, no random numbers. ValueError: `cost_NR` is no
    matrix of R * `size` rows, or not finite.

    Successive shortest paths (Ahuja, Magnanti, Orlin: Network Flows, 1993, section 9.7) on a graph of only R nodes:
    rows move along the cheapest chain of columns from an overfull to an underfull one, all that tie at once. Rows
    start where prices on the columns send them; good prices, from a thinned problem and then one column at a time,
    leave few moves.

    Example: cost [[0, 5], [1, 2], [2, 9], [3, 4]], size 2 gives [0, 1, 0, 1].
    """
    if cost_NR.ndim != 2 or cost_NR.shape[1] == 0 or size < 1:
        raise ValueError(f"balanced assignment: shape {list(cost_NR.shape)} and size {size} hold no rows and columns")
    num_rows, num_columns = cost_NR.shape
    if num_rows != num_columns * size:
        raise ValueError(f"balanced assignment: {num_rows} rows do not fill {num_columns} columns of {size}")
    return _solve(_on_grid(cost_NR), size).column_N


def _on_grid(cost_NR: np.ndarray) -> np.ndarray:
    """Costs as integers [R, N], so that no sum rounds and no rounding closes a negative cycle.

    First each row's and then each column's least is taken off, which changes no optimum.
    """
    cost_NR = np.asarray(cost_NR, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        above_NR = cost_NR - cost_NR.min(axis=1, keepdims=True)
        above_NR -= above_NR.min(axis=0)
    if not np.isfinite(above_NR).all():
        raise ValueError("balanced assignment: costs and their differences must be finite")
    bits = min(_GRID_BITS, 60 - cost_NR.shape[1].bit_length())  # a chain of R moves must stay below _FAR
    _, exponent = np.frexp(above_NR.max())
    return np.ascontiguousarray(np.rint(np.ldexp(above_NR, bits - int(exponent))).T.astype(np.int64))


def _solve(cost_RN: np.ndarray, size: int) -> _Transport:
    """The solved problem; prices start from those of the same problem on every few rows, as rows are much alike."""
    num_columns, few = len(cost_RN), size // _THINNING
    price_R = np.zeros(num_columns, dtype=np.int64)
    if few > 0:
        price_R = _solve(cost_RN[:, ::_THINNING][:, : num_columns * few], few).prices()
    transport = _Transport(cost_RN, _sweep(cost_RN, price_R, size), size)
    transport.balance()
    return transport


def _sweep(cost_RN: np.ndarray, price_R: np.ndarray, size: int) -> np.ndarray:
    """Prices after giving each column in turn the price at which it is the cheapest for just `size` rows.

    Coordinate ascent on the dual. It can stall short of the optimum (two columns alike must rise together), so it
    only brings the prices near.
    """
    price_R = price_R.copy()
    value_RN = cost_RN + price_R[:, None]
    for _ in range(_SWEEPS):
        before_R = price_R.copy()
        for column, cost_N in enumerate(cost_RN):
            value_RN[column] = _FAR
            highest_N = value_RN.min(axis=0) - cost_N  # price up to which each row would still come here
            price_R[column] = np.partition(highest_N, -size)[-size]
            value_RN[column] = cost_N + price_R[column]
        if np.array_equal(price_R, before_R):
            break
    return price_R


class _Transport:
    """An assignment that is the cheapest of all with its column counts, and the steps that keep it so.

    `_move_RR` is the change in cost of the cheapest move of one row between every two columns. No cycle of moves is
    negative: at the start every row is in its cheapest column under some prices, and a shortest path makes none.
    """

    def __init__(self, cost_RN: np.ndarray, price_R: np.ndarray, size: int) -> None:
        num_columns = len(cost_RN)
        self._cost_RN, self._size = cost_RN, size
        self.column_N = (cost_RN + price_R[:, None]).argmin(axis=0)
        self._counts_R = np.bincount(self.column_N, minlength=num_columns)
        self._move_RR = np.full((num_columns, num_columns), _FAR)
        self._refresh(range(num_columns))

    def balance(self) -> None:
        """Move rows until every column has its size."""
        while (self._counts_R > self._size).any():
            source = int(np.argmax(self._counts_R > self._size))
            path = _cheapest_path(self._move_RR, source, self._counts_R < self._size)
            self._shift(path)
            self._refresh(path)

    def prices(self) -> np.ndarray:
        """Prices [R] under which every row is in its cheapest column: minus the shortest distances by moves."""
        distance_R = np.zeros(len(self._cost_RN), dtype=np.int64)
        while True:
            nearer_R = np.minimum(distance_R, (distance_R[:, None] + self._move_RR).min(axis=0))
            if np.array_equal(nearer_R, distance_R):
                return -distance_R
            distance_R = nearer_R

    def _shift(self, path: list[int]) -> None:
        """Move along `path` as many rows as need it and tie on every step: the path stays the cheapest meanwhile."""
        source, goal = path[0], path[-1]
        steps = [(self._movable(start, stop), stop) for start, stop in pairwise(path)]
        wanted = min(self._counts_R[source] - self._size, self._size - self._counts_R[goal])
        num_moved = min(wanted, *(len(row_M) for row_M, _ in steps))
        for row_M, stop in steps:
            self.column_N[row_M[:num_moved]] = stop
        self._counts_R[source] -= num_moved
        self._counts_R[goal] += num_moved

    def _movable(self, start: int, stop: int) -> np.ndarray:
        """Rows of `start` that are the cheapest to move to `stop`."""
        member_M = np.flatnonzero(self.column_N == start)
        change_M = self._cost_RN[stop, member_M] - self._cost_RN[start, member_M]
        return member_M[change_M == self._move_RR[start, stop]]

    def _refresh(self, columns: range | list[int]) -> None:
        for column in columns:
            cost_RM = self._cost_RN[:, self.column_N == column]
            self._move_RR[column] = (cost_RM - cost_RM[column]).min(axis=1, initial=_FAR)
            self._move_RR[column, column] = _FAR


def _cheapest_path(move_RR: np.ndarray, source: int, is_goal_R: np.ndarray) -> list[int]:
    """Bellman-Ford from `source` to the nearest goal; a source has rows, so it reaches every column in one move."""
    num_columns = len(move_RR)
    distance_R, parent_R = move_RR[source].copy(), np.full(num_columns, source)
    distance_R[source] = 0
    for _ in range(num_columns - 2):
        through_RR = distance_R[:, None] + move_RR
        best_R = through_RR.argmin(axis=0)
        nearest_R = through_RR[best_R, np.arange(num_columns)]
        shorter_R = nearest_R < distance_R
        if not shorter_R.any():
            break
        distance_R, parent_R = np.where(shorter_R, nearest_R, distance_R), np.where(shorter_R, best_R, parent_R)
    path = [int(np.where(is_goal_R, distance_R, _FAR).argmin())]
    while path[-1] != source:
        path.append(int(parent_R[path[-1]]))
    return path[::-1]

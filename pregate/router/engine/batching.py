"""Which of the tokens that could run next make the cheapest step, decided from their paths before anything runs.

Data on its way: the units each candidate needs (a decode token, or the next chunk of a prompt) -> an order in which
those come first that share their units -> the seconds of every beginning of that order -> the one with the fewest
seconds per token, or, where that saves little, those that came first. NumPy only: no torch, no clock.

A step takes, layer by layer, as long as its slowest host: the bytes of the units it reads (or loads first) and the rows
it computes; and what it takes around the layers.

Shape letters: N candidates, M beginnings of an order of them, U units of all layers end to end, L layers, R units of a
layer, H hosts, G groups of units of one layer on one host, T tokens, K experts per token, 4 parts of a step's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pregate.router.engine.step_fit import StepFit

#: Places at which a step may end are where rounds of the order end, and about so many others between them.
_MARKS = 16
#: Of so many candidates the order begins with one, of twice as many with two.
_BEGINNINGS = 64
#: Whoever came first runs unless others take so much less time a token.
_GAIN = 0.1


@dataclass(frozen=True)
class StepCosts:
    """What a step takes, in seconds. Per host [H]: a row of one expert, a byte of a unit that is read from its
    slot, one that is loaded first. `dispatch_s`: a layer's way to its hosts and back. `step_s`: a step around its
    layers, and `token_s` each token there."""

    row_s: tuple[float, ...]
    resident_byte_s: tuple[float, ...]
    missing_byte_s: tuple[float, ...]
    dispatch_s: float = 0.0
    step_s: float = 0.0
    token_s: float = 0.0


class UnitLayout:
    """Where units lie. `hosts_of_LR` int: each unit's home host, -1 where a layer has fewer; `bytes_L`: of one unit.

    Units are kept side by side in groups of one layer and one host, so that sums over a group are sums of a slice.
    """

    def __init__(self, hosts_of_LR: np.ndarray, bytes_L: Sequence[int], num_hosts: int) -> None:
        layer, expert = np.nonzero(hosts_of_LR >= 0)
        host = hosts_of_LR[layer, expert].astype(np.int64)
        order = np.lexsort((expert, host, layer))
        self.num_hosts = num_hosts
        self.layer_U, self.expert_U, self.host_U = layer[order], expert[order], host[order]
        self.bytes_U = np.asarray(bytes_L, dtype=np.float64)[self.layer_U]
        self.unit_of_LR = np.full(hosts_of_LR.shape, -1, dtype=np.int64)
        self.unit_of_LR[self.layer_U, self.expert_U] = np.arange(len(order))
        key_U = self.layer_U * num_hosts + self.host_U
        self.start_G, self.group_U = np.unique(key_U, return_index=True, return_inverse=True)[1:]
        self.host_G, layer_G = self.host_U[self.start_G], self.layer_U[self.start_G]
        self.start_L = np.unique(layer_G, return_index=True)[1]  # of the layers that have units

    @property
    def num_units(self) -> int:
        return len(self.layer_U)

    def placed(self, hosts_of_LR: np.ndarray, num_hosts: int) -> tuple[UnitLayout, np.ndarray]:
        """The layout when the same units lie elsewhere, and where each of its units is in this one, int [U]."""
        bytes_L = np.zeros(len(hosts_of_LR), dtype=np.int64)
        bytes_L[self.layer_U] = self.bytes_U
        layout = UnitLayout(hosts_of_LR, bytes_L.tolist(), num_hosts)
        return layout, self.unit_of_LR[layout.layer_U, layout.expert_U]

    def by_layer(self, rows_U: np.ndarray) -> np.ndarray:
        """What is of each unit as float32 [L, R], 0 where there is no unit."""
        found_LR = np.zeros(self.unit_of_LR.shape, dtype=np.float32)
        found_LR[self.layer_U, self.expert_U] = rows_U
        return found_LR

    def rows(self, ids_TLK: np.ndarray) -> np.ndarray:
        """How many rows of tokens with these paths (-1 where none) each unit computes, uint16 [U]."""
        layer = np.arange(ids_TLK.shape[1])[:, None]
        units = self.unit_of_LR[layer, ids_TLK][ids_TLK >= 0]
        return np.bincount(units, minlength=self.num_units).clip(max=0xFFFF).astype(np.uint16)

    def rows_each(self, ids_TLK: np.ndarray) -> np.ndarray:
        """The rows of each token by itself, uint16 [T, U]."""
        token, layer, column = np.nonzero(ids_TLK >= 0)
        rows_TU = np.zeros((len(ids_TLK), self.num_units), dtype=np.uint16)
        rows_TU[token, self.unit_of_LR[layer, ids_TLK[token, layer, column]]] = 1
        return rows_TU


@dataclass(frozen=True)
class Choice:
    """`order`: the candidates that run, those that are overdue first. The last may run in part, where the budget ends.
    `step_s` is what the step is thought to take, `num_units` how many units it asks for. `chosen`: they are not just
    those that came first."""

    order: tuple[int, ...]
    step_s: float
    num_units: int
    chosen: bool


class PathBatcher:
    """Chooses steps for one placement. `resident_U` says which units need not be loaded (`hold`), `fit` how far steps
    take what `costs` say (`learn`), and `first_fit` those among them that take whoever came first, after such a one: of
    them hosts know before what they ask for, so their loads may cost less."""

    def __init__(self, layout: UnitLayout, costs: StepCosts, fits: tuple[StepFit, StepFit] | None = None) -> None:
        self.layout, self.costs = layout, costs
        self.fit, self.first_fit = fits or (StepFit(), StepFit())
        self._chosen = True  # the step before
        self.resident_U = np.ones(layout.num_units, dtype=bool)
        self._joined, self._memory = np.empty(0, dtype=np.uint16), np.empty((2, 0, 0), dtype=np.float32)
        self._row_s_G = np.asarray(costs.row_s)[layout.host_G].astype(np.float32)
        read_s_H, load_s_H = np.asarray(costs.resident_byte_s), np.asarray(costs.missing_byte_s)
        self._read_s_U, self._more_s_U = (  # of each unit, and what it takes more where it is missing
            (byte_s_H[layout.host_U] * layout.bytes_U).astype(np.float32)
            for byte_s_H in (read_s_H, (load_s_H - read_s_H).clip(min=0))
        )

    def placed(self, hosts_of_LR: np.ndarray, num_hosts: int) -> tuple[PathBatcher, np.ndarray]:
        """The batcher when units lie elsewhere, and where each unit was in this one, int [U]. A host that is new is
        thought to be as fast as the first."""
        layout, was_U = self.layout.placed(hosts_of_LR, num_hosts)
        row_s, resident_byte_s, missing_byte_s = (
            (*times[:num_hosts], *times[:1] * (num_hosts - len(times)))
            for times in (self.costs.row_s, self.costs.resident_byte_s, self.costs.missing_byte_s)
        )
        costs = replace(self.costs, row_s=row_s, resident_byte_s=resident_byte_s, missing_byte_s=missing_byte_s)
        return PathBatcher(layout, costs, (self.fit, self.first_fit)), was_U

    def hold(self, held_LR: np.ndarray | None) -> None:
        """Take in which units are held, bool [L, R]; None: all of them."""
        layout = self.layout
        self.resident_U = np.ones_like(self.resident_U) if held_LR is None else held_LR[layout.layer_U, layout.expert_U]

    def learn(self, rows_U: np.ndarray, num_tokens: int, took_s: float, chosen: bool = False) -> None:
        """Take in what a step took that asked these rows of the units, held as they were when it was `chosen`, or when
        whoever came first was taken."""
        parts_4 = self._parts_of(rows_U, num_tokens)
        self.fit.add(parts_4, took_s)
        if not chosen and not self._chosen:
            self.first_fit.add(parts_4, took_s)
        self._chosen = chosen

    @property
    def learned(self) -> StepCosts:
        """The constants as steps bear them out."""
        around, token, held, more = self.fit.factors_4.tolist()
        row_s, resident_byte_s = (
            tuple(held * s for s in times) for times in (self.costs.row_s, self.costs.resident_byte_s)
        )
        missing_byte_s = tuple(
            held * read_s + more * max(0.0, load_s - read_s)
            for read_s, load_s in zip(self.costs.resident_byte_s, self.costs.missing_byte_s, strict=True)
        )
        dispatch_s, step_s = around * self.costs.dispatch_s, around * self.costs.step_s
        return StepCosts(row_s, resident_byte_s, missing_byte_s, dispatch_s, step_s, token * self.costs.token_s)

    def unit_s(self) -> np.ndarray:
        """Seconds that each unit takes where it is asked for, as steps bear them out [U]."""
        held, more = self.fit.factors_4[2:].astype(np.float32)
        return held * self._read_s_U + np.where(self.resident_U, 0, more * self._more_s_U)

    def step_s(self, rows_U: np.ndarray, num_tokens: int) -> float:
        """What a step of so many tokens is thought to take that asks these rows of the units."""
        return float(self.fit.factors_4 @ self._parts_of(rows_U, num_tokens))

    def choose(
        self, tokens: Sequence[int], rows: Sequence[np.ndarray], num_late: int, budget: int, trial: bool = False
    ) -> Choice:
        """Return which candidates run in a step of at most `budget` tokens. Of each are given how many tokens it has,
        and the rows they ask of each unit, uint16 [U]; the first `num_late` must go now. Of the others as many run as
        make the seconds per token least; but as many of the first as fit where nobody else saves `_GAIN` of that, and
        in a `trial`, which shows what such a step takes."""
        assert len(tokens) == len(rows) > 0 and budget > 0, "nothing to choose from"
        tokens_N = np.array(tokens, dtype=np.float32)
        rows_NU, needs_NU = self._tables(rows, max(tokens) == 1)
        order_N, ends = self._order(needs_NU, rows_NU.sum(axis=0), tokens_N, num_late)
        ends_M = _ends(tokens_N[order_N], ends, num_late, budget)
        num_first = min(_num_full(tokens_N, budget), len(order_N))
        in_MN = np.zeros((len(ends_M) + 1, len(order_N)), dtype=np.float32)
        in_MN[-1, :num_first] = 1  # those that came first are the last row
        for row_N, end in zip(in_MN, ends_M, strict=False):
            row_N[order_N[:end]] = 1
        tokens_M = np.minimum(in_MN @ tokens_N, budget)
        parts_4M, units_M = self._parts(in_MN @ rows_NU, tokens_M)
        seconds_M = self.fit.factors_4 @ parts_4M
        seconds_M[-1] = self.first_fit.factors_4 @ parts_4M[:, -1]
        token_s_M = seconds_M / tokens_M
        token_s_M[:-1][(in_MN[:-1] == in_MN[-1]).all(axis=1)] = np.inf  # they are those that came first
        best = int(np.argmin(token_s_M))
        if trial or token_s_M[-1] * (1 - _GAIN) <= token_s_M[best]:
            best = len(ends_M)
        chosen = best < len(ends_M)
        some_N = order_N[: ends_M[best]] if chosen else np.arange(num_first)
        return Choice(tuple(some_N.tolist()), float(seconds_M[best]), int(units_M[best]), chosen)

    def _tables(self, rows: Sequence[np.ndarray], single: bool) -> tuple[np.ndarray, np.ndarray]:
        """The candidates' rows, and 1 where there are any, both float32 [N, U], the same where each is `single`, of
        one token; in memory that the next call uses again: to be given as much anew takes longer than to fill it."""
        num, num_units = len(rows), self.layout.num_units
        if num > self._memory.shape[1]:
            self._joined = np.empty(2 * num * num_units, dtype=np.uint16)
            self._memory = np.empty((2, 2 * num, num_units), dtype=np.float32)
        joined, (rows_NU, needs_NU) = self._joined[: num * num_units], self._memory[:, :num]
        np.concatenate(rows, out=joined)
        np.copyto(rows_NU, joined.reshape(rows_NU.shape))
        return rows_NU, rows_NU if single else np.minimum(rows_NU, 1, out=needs_NU)

    def _order(
        self, needs_NU: np.ndarray, num_rows_U: np.ndarray, tokens_N: np.ndarray, num_late: int
    ) -> tuple[np.ndarray, list[int]]:
        """An order of all, the first `num_late` first, in which whoever asks for the least that was not asked for yet
        is next; and where in it the rounds end.

        What a unit takes is shared by the rows that need it: so units that many ask for come first, and with them
        whoever needs no others. Rounds take in 1, 2, 4, 16, 64, ... candidates (of very many more), and all that ask
        for nothing more.
        """
        share_U = self.unit_s() / np.maximum(num_rows_U, 1)
        in_N = np.zeros(len(needs_NU), dtype=np.float32)
        in_N[:num_late] = 1
        first, left = np.split(np.arange(len(needs_NU)), [num_late])
        parts, ends, size = [first], [num_late], 1 + len(left) // _BEGINNINGS
        while len(left):
            share_U = share_U * (in_N @ needs_NU == 0)  # nothing more for a unit that is asked for
            score = (needs_NU @ share_U / tokens_N)[left]
            order = np.argsort(score, kind="stable")
            num = max(size, int(np.searchsorted(score[order], 0.0, side="right")))
            taken, left = left[order[:num]], left[order[num:]]
            parts.append(taken)
            ends.append(ends[-1] + len(taken))
            in_N[taken] = 1
            size *= 2 if size < 4 else 4
        return np.concatenate(parts), ends

    def _parts_of(self, rows_U: np.ndarray, num_tokens: int) -> np.ndarray:
        return self._parts(rows_U[None].astype(np.float32), np.array([num_tokens]))[0][:, 0]

    def _parts(self, rows_MU: np.ndarray, tokens_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What steps take by the constants that ask these rows of the units, with so many tokens: anyhow, by tokens,
        in their layers, and what loads add to those [4, M]; and how many units they need [M]."""
        needs_MU = rows_MU > 0
        start_G = self.layout.start_G
        group_s_MG = np.add.reduceat(needs_MU * self._read_s_U, start_G, axis=1)
        group_s_MG += np.add.reduceat(rows_MU, start_G, axis=1) * self._row_s_G
        held_M = more_M = self._layers(group_s_MG)
        if not self.resident_U.all():
            group_s_MG += np.add.reduceat(needs_MU * np.where(self.resident_U, 0, self._more_s_U), start_G, axis=1)
            more_M = self._layers(group_s_MG)
        around_s = self.costs.step_s + self.costs.dispatch_s * len(self.layout.start_L)
        parts_4M = np.stack([np.full_like(held_M, around_s), self.costs.token_s * tokens_M, held_M, more_M - held_M])
        return parts_4M, needs_MU.sum(axis=1)

    def _layers(self, group_s_MG: np.ndarray) -> np.ndarray:
        """Seconds of all layers [M], each as long as its slowest host."""
        return np.maximum.reduceat(group_s_MG, self.layout.start_L, axis=1).sum(axis=1, dtype=np.float64)


def _num_full(tokens_N: np.ndarray, budget: int) -> int:
    """How many of the first fill the budget, or go beyond with the last of them; one more than all where none do."""
    return int(np.searchsorted(tokens_N.cumsum(), budget)) + 1


def _ends(tokens_N: np.ndarray, rounds: list[int], num_late: int, budget: int) -> np.ndarray:
    """Where a step may end in an order of candidates with these tokens [M]: not before all that are overdue."""
    num_full = _num_full(tokens_N, budget)
    num_all, least = min(num_full, len(tokens_N)), min(max(num_late, 1), num_full)
    marks = {*rounds, *range(least, num_all, max(1, num_all // _MARKS)), least, num_all}
    return np.array(sorted(m for m in marks if least <= m <= num_all))

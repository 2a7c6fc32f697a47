"""Made-up layouts, costs and candidates for tests of batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pregate.router.engine.batching import Choice, PathBatcher, StepCosts, UnitLayout


class Candidate(NamedTuple):
    """What could run next: so many tokens, and the rows they ask of each unit, uint16 [U]. `overdue`: it must go."""

    num_tokens: int
    rows_U: np.ndarray
    overdue: bool = False


def choose(batcher: PathBatcher, candidates: Sequence[Candidate], budget: int) -> Choice:
    tokens, rows, overdue = zip(*candidates, strict=True)
    return batcher.choose(tokens, rows, sum(overdue), budget)


def check_choice(choice: Choice, candidates: Sequence[Candidate], budget: int) -> None:
    """AssertionError unless a choice runs each candidate once, keeps its budget but for the last one's rest, and leaves
    out one that is overdue only where others that are have filled it."""
    order = choice.order
    assert len(set(order)) == len(order) >= 1, "a candidate runs once"
    assert sum(candidates[n].num_tokens for n in order[:-1]) < budget, "the last one has no room"
    late = [n for n, c in enumerate(candidates) if c.overdue]
    num_late = min(len(late), len(order))
    assert list(order[:num_late]) == late[:num_late], "who is overdue goes first"
    if num_late < len(late):
        assert sum(candidates[n].num_tokens for n in order) >= budget, "one that is overdue was left out"


def layout(num_layers: int, num_routed: int, num_hosts: int = 1, unit_bytes: int = 1000) -> UnitLayout:
    """Experts dealt to hosts in runs."""
    hosts = np.arange(num_routed) * num_hosts // num_routed
    return UnitLayout(np.tile(hosts, (num_layers, 1)), [unit_bytes] * num_layers, num_hosts)


def costs(num_hosts: int = 1, *, row=1e-6, byte=1e-6, missing=1e-5, **more) -> StepCosts:
    return StepCosts((row,) * num_hosts, (byte,) * num_hosts, (missing,) * num_hosts, **more)


def random_ids(rng: np.random.Generator, num: int, num_layers: int, num_routed: int, num_active: int) -> np.ndarray:
    """Paths [T, L, K] without any structure."""
    ids = np.argsort(rng.random((num, num_layers, num_routed)), axis=2)[:, :, :num_active]
    return np.sort(ids, axis=2).astype(np.int16)


def decodes(batcher: PathBatcher, ids_TLK: np.ndarray) -> list[Candidate]:
    rows = batcher.layout.rows_each(ids_TLK)
    return [Candidate(1, rows_U) for rows_U in rows]

"""Made-up layouts, costs and candidates for tests of batching."""

from __future__ import annotations

import numpy as np

from pregate.router.engine.batching import Candidate, PathBatcher, StepCosts, UnitLayout


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

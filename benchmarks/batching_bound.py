"""How near batches by path come to the best order of batches there is, on cases small enough to try all.

    python -m benchmarks.batching_bound --paths paths.npz --costs costs.json

Some texts that all wait decode some tokens each, taken from the recorded paths of `benchmarks.batching --paths`. A
state is how many each has decoded; every subset of those that are not done is a step from it; the best order is the
shortest way. Seconds of all steps, over the best, for all at once, for `PathBatcher`'s choice, and for at most half at
a time in order of arrival.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.batching import COSTS
from pregate.cluster.placement import place
from pregate.router.engine.batching import PathBatcher, StepCosts, UnitLayout


def ratios(batcher: PathBatcher, rows_NTU: np.ndarray) -> dict[str, float]:
    """Seconds over those of the best order, of N texts with T tokens each."""
    num_texts, num_tokens = rows_NTU.shape[:2]

    def step_s(state: tuple[int, ...], some: tuple[int, ...]) -> float:
        rows_U = rows_NTU[list(some), [state[n] for n in some]].sum(axis=0, dtype=np.int64)
        return batcher.step_s(rows_U, len(some))

    def after(state: tuple[int, ...], some: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(done + (n in some) for n, done in enumerate(state))

    @cache
    def best_s(state: tuple[int, ...]) -> float:
        left = [n for n, done in enumerate(state) if done < num_tokens]
        subsets = (some for size in range(1, len(left) + 1) for some in combinations(left, size))
        return min((step_s(state, some) + best_s(after(state, some)) for some in subsets), default=0.0)

    def all_s(choose: Any) -> float:
        state, seconds = (0,) * num_texts, 0.0
        while left := tuple(n for n, done in enumerate(state) if done < num_tokens):
            some = choose(state, left)
            seconds, state = seconds + step_s(state, some), after(state, some)
        return seconds

    def by_path(state: tuple[int, ...], left: tuple[int, ...]) -> tuple[int, ...]:
        choice = batcher.choose([1] * len(left), [rows_NTU[n, state[n]] for n in left], 0, num_texts)
        return tuple(left[n] for n in choice.order)

    best = best_s((0,) * num_texts)
    ways = {"all": lambda _, left: left, "path": by_path, "half": lambda _, left: left[: num_texts // 2]}
    return {name: all_s(choose) / best for name, choose in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=Path, required=True)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    known, costs, found = np.load(given.paths), json.loads(given.costs.read_text()), []
    ids_TLK, num_routed = known["ids_TLK"], known["num_routed"].tolist()
    if given.layers:
        ids_TLK, num_routed = np.repeat(ids_TLK[:, :1], given.layers, axis=1), num_routed[:1] * given.layers
    unit_bytes = costs.get("unit_bytes") or known["unit_bytes"].tolist()[:1] * len(num_routed)
    for num_hosts in given.hosts:
        layout = UnitLayout(place(num_routed, num_hosts, "linear").hosts_of, unit_bytes, num_hosts)
        row_s, byte_s, missing_s = ((costs[name],) * num_hosts for name in COSTS)
        way = costs["dispatch_s" if num_hosts == 1 else "remote_dispatch_s"]
        batcher = PathBatcher(layout, StepCosts(row_s, byte_s, missing_s, way, costs["step_s"], costs["token_s"]))
        for resident in (1.0, 0.25):
            rng, some = np.random.default_rng(0), []
            for _ in range(given.cases):
                batcher.resident_U = rng.random(layout.num_units) < resident
                starts = rng.integers(0, len(ids_TLK) - given.tokens, given.texts)
                some.append(
                    ratios(batcher, np.stack([layout.rows_each(ids_TLK[s : s + given.tokens]) for s in starts]))
                )
            mean = {name: [round(float(f([x[name] for x in some])), 4) for f in (np.mean, np.max)] for name in some[0]}
            found.append({"hosts": num_hosts, "resident": resident, "over_best": mean})
            print(found[-1], flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Balanced assignment of CMoE's clustering: ours, `lap` and SciPy on the same costs, cost and time.

    pip install ".[bench]"
    python -m benchmarks.assignment

The costs are those of synthetic marks: tokens of 64 topics mark 10 neurons each, popularity falls off as in Zipf's
law, the most popular neurons are shared and left out. `first` is the first assignment (0/1 centroids: integers, many
ties), `later` one after a mean, `uniform` random numbers. The others solve the square problem in which every column
is repeated; building it is not timed. Writes results/assignment.json and .md.

Shape letters: N rows, R columns, T tokens, K marks per token, F neurons with the shared ones.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.surroundings import sentence, surroundings
from pregate.convert.cut.assignment import balanced_assignment
from pregate.convert.cut.cmoe import distances, means

NUM_TOKENS, NUM_MARKS, NUM_TOPICS = 16_384, 10, 64
OUR_REPEATS = 9
MANY_ROWS = 5_000  # from here on the others run once
MOST_ROWS = 10_000  # from here on not at all: a square of 28,672 rows is 6.6 GB


@dataclass(frozen=True)
class Layer:
    """A layer's cut: routed and shared experts, neurons of each."""

    routed: int
    shared: int
    size: int

    @property
    def num_rows(self) -> int:
        return self.routed * self.size

    def __str__(self) -> str:
        return f"{self.num_rows:,} x {self.routed} (S{self.shared}E{self.routed + self.shared})"


LAYERS = (
    Layer(5, 3, 64),
    Layer(5, 3, 256),
    Layer(5, 3, 1376),
    Layer(14, 2, 491),
    Layer(5, 3, 3584),
    Layer(14, 2, 2048),
)


def synthetic_marks(num_neurons: int, seed: int) -> np.ndarray:
    """Ids [T, K] of the neurons each token marks: the largest of popularity, liking of the topic and noise."""
    rng = np.random.default_rng(seed)
    popularity_F = -0.9 * np.log(rng.permutation(num_neurons) + 1.0)
    liking_F = 1.5 * rng.normal(size=(NUM_TOPICS, num_neurons))
    marks_TK = np.empty((NUM_TOKENS, NUM_MARKS), dtype=np.int64)
    for token, topic in enumerate(rng.integers(NUM_TOPICS, size=NUM_TOKENS)):
        score_F = popularity_F + liking_F[topic] + rng.gumbel(size=num_neurons)
        marks_TK[token] = np.argpartition(score_F, -NUM_MARKS)[-NUM_MARKS:]
    return marks_TK


def all_costs(layer: Layer, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Costs [N, R] as the clustering of `layer` has them, and random ones."""
    num_rows, num_shared = layer.num_rows, layer.shared * layer.size
    marks_TK = torch.from_numpy(synthetic_marks(num_rows + num_shared, seed))
    count_F = torch.bincount(marks_TK.flatten(), minlength=num_rows + num_shared)
    popular_F = count_F.argsort(descending=True, stable=True)
    candidates_N = popular_F[num_shared:].sort().values
    position_F = torch.full((num_rows + num_shared,), num_rows)
    position_F[candidates_N] = torch.arange(num_rows)
    marks_TK, seeds_R = position_F[marks_TK], position_F[popular_F[num_shared : num_shared + layer.routed]]
    first = distances(marks_TK, num_rows, (marks_TK[:, :, None] == seeds_R).any(dim=1).double(), "l1").numpy()
    yield "first", first
    labels_N = torch.from_numpy(balanced_assignment(first, layer.size))
    yield "later", distances(marks_TK, num_rows, means(marks_TK, labels_N, layer.routed), "l1").numpy()
    yield "uniform", np.random.default_rng(seed).random((num_rows, layer.routed))


def timed(solve: Callable[[], np.ndarray], cost_NR: np.ndarray, repeats: int) -> dict[str, Any]:
    """Total cost, and the median seconds of `repeats` calls of `solve`, which gives the column of each row."""
    seconds, column_N = [], np.empty(0, dtype=np.int64)
    for _ in range(repeats):
        started = time.perf_counter()
        column_N = solve()
        seconds.append(time.perf_counter() - started)
    assert len(set(np.bincount(column_N, minlength=cost_NR.shape[1]))) == 1, "unequal columns"
    total = float(np.take_along_axis(cost_NR, column_N[:, None], axis=1).sum())
    return {"cost": total, "seconds": statistics.median(seconds), "repeats": repeats}


def compare(layer: Layer, cost_NR: np.ndarray) -> dict[str, dict[str, Any]]:
    solvers = {"ours": timed(lambda: balanced_assignment(cost_NR, layer.size), cost_NR, OUR_REPEATS)}
    if layer.num_rows < MOST_ROWS:
        repeats = 1 if layer.num_rows >= MANY_ROWS else 3
        lap = importlib.import_module("lap")  # not in the development group
        square_NN = np.repeat(cost_NR, layer.size, axis=1)
        solvers["lap"] = timed(lambda: lap.lapjv(square_NN)[1] // layer.size, cost_NR, repeats)
        solvers["scipy"] = timed(lambda: linear_sum_assignment(square_NN)[1] // layer.size, cost_NR, repeats)
    return solvers


def run(seed: int) -> list[dict[str, Any]]:
    rows = []
    for layer in LAYERS:
        for name, cost_NR in all_costs(layer, seed):
            rows.append({"layer": str(layer), "num_rows": layer.num_rows, "num_columns": layer.routed, "costs": name})
            rows[-1]["solvers"] = compare(layer, cost_NR)
            print(table(rows[-1]), flush=True)
    return rows


def table(row: dict[str, Any]) -> str:
    """Markdown lines of one problem; the optimum is the least cost that any solver found."""
    solvers = row["solvers"]
    least = min(s["cost"] for s in solvers.values())
    lines = []
    for name, figures in solvers.items():
        gap = (figures["cost"] - least) / abs(least)
        speed_up = f"{solvers['lap']['seconds'] / figures['seconds']:.3g}" if "lap" in solvers else ""
        shown_gap = (f"{gap:.1e}" if gap else "0") if len(solvers) > 1 else ""
        cells = [f"{figures['cost']:.6f}", shown_gap, f"{figures['seconds']:.4f}", speed_up]
        lines.append(f"| {' | '.join([row['layer'], row['costs'], name, *cells])} |")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    header = """# Balanced assignment: cost and time

| rows x columns | costs | solver | total cost | gap to the least | seconds | speed-up over lap |
| --- | --- | --- | --: | --: | --: | --: |
"""
    notes = f"""

`first`, `later`: L1 distances of synthetic marks ({NUM_TOKENS:,} tokens, {NUM_MARKS} each) to 0/1 centroids and to
means; `uniform`: random. lap and SciPy solve the square problem of repeated columns, its building untimed; from
{MOST_ROWS:,} rows on they are left out. Ours: median of {OUR_REPEATS}; the others: median of 3, from {MANY_ROWS:,} rows
on one run. 6,874 = 14 x 491 is the multiple of 14 nearest to 6,880.

{sentence(result["surroundings"])}.
"""
    return header + "\n".join(table(row) for row in result["rows"]) + notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if importlib.util.find_spec("lap") is None:
        sys.exit('benchmarks.assignment compares with lap, which is not installed: pip install ".[bench]"')
    result: dict[str, Any] = {"rows": run(args.seed)}
    result["surroundings"] = surroundings("assignment", ["scipy", "lap"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "assignment.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "assignment.md").write_text(markdown(result))


if __name__ == "__main__":
    main()

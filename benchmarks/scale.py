"""From 1 to 1,000 simulated hosts under 10,000 requests: what planning takes, how even the work is, what a loss costs.

Scheduler, block allocator, lookahead, placement, the choice of copies and the planner are those that serve, and the
times given for them are real. Hosts are simulated: in each layer a host takes what its units' bytes and its rows take,
by constants measured here at the start (one expert of this shape, one thread); a layer takes its slowest host and a
round trip. Paths are Zipf's: tokens draw one of many paths with chance 1 / rank, and paths draw their experts so too.

    python -m benchmarks.scale
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale_report import draw, markdown
from benchmarks.surroundings import surroundings
from pregate.cluster.placement import Placement, place
from pregate.cluster.rebalance import moved, moves, slowest_load
from pregate.model.config import LayerCut
from pregate.model.paths import Paths
from pregate.router.engine.assignment import adopt, choose_hosts, hosts_of_pairs, share_rows
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.lookahead import Lookahead
from pregate.router.engine.planning import make_plan
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams

OUT = Path(__file__).parent / "results"
HOSTS = (1, 2, 4, 8, 16, 32, 64, 125, 250, 500, 1000)
#: Hidden width, and an expert's.
SHAPE = (1024, 256)
#: A round trip of a layer's rows over the channel: results/dispatch.json, one host, idle, median.
ROUND_TRIP_S = 2.53e-4
WAYS = ("linear", "balanced", "balanced + copies, homes", "balanced + copies, chosen", "balanced + copies, shared")


@dataclass(frozen=True)
class Costs:
    """Seconds of a row, of a byte of a unit that is read, and of one that is loaded from a file; a unit's bytes."""

    row_s: float
    byte_s: float
    load_byte_s: float
    unit_bytes: int

    @property
    def unit_s(self) -> float:
        return self.unit_bytes * self.byte_s


def measured(folder: Path) -> Costs:
    """Time one expert on one row and on many, and reading it from a file; the least of many times."""
    import torch

    torch.set_num_threads(1)
    width, inner = SHAPE
    units = [(torch.randn(2 * inner, width), torch.randn(width, inner)) for _ in range(64)]  # more than caches hold
    unit_bytes = 3 * width * inner * 4

    def run(rows: int) -> float:
        x, times = torch.randn(rows, width), []
        for up, down in units * 3:
            start_s = time.perf_counter()
            gate, value = (x @ up.T).chunk(2, dim=1)
            _ = (torch.nn.functional.silu(gate) * value) @ down.T
            times.append(time.perf_counter() - start_s)
        return min(times)

    one_s, many_s = run(1), run(64)
    file = folder / "unit.bin"
    file.write_bytes(os.urandom(unit_bytes))
    reads = []
    for _ in range(20):
        start_s = time.perf_counter()
        np.frombuffer(file.read_bytes(), dtype=np.float32).copy()
        reads.append(time.perf_counter() - start_s)
    file.unlink()
    row_s = max(1e-9, (many_s - one_s) / 63)
    return Costs(row_s, max(1e-13, one_s - row_s) / unit_bytes, min(reads) / unit_bytes, unit_bytes)


class Traffic:
    """Zipf paths [P, L, K] and tokens that draw them. `drifted`: other paths are popular."""

    def __init__(self, num_layers: int, num_routed: int, k: int, seed: int, num_paths: int = 4096) -> None:
        self.rng = np.random.default_rng(seed)
        share_R = np.arange(1, num_routed + 1.0) ** -1
        keys = np.log(share_R) + self.rng.gumbel(size=(num_paths, num_layers, num_routed))
        ids = np.argpartition(-keys, k - 1, axis=2)[:, :, :k]
        names_LR = np.stack([self.rng.permutation(num_routed) for _ in range(num_layers)])
        self.paths_PLK = np.sort(names_LR[np.arange(num_layers)[:, None], ids], axis=2).astype(np.int16)
        self.share_P = np.arange(1, num_paths + 1.0) ** -1
        self.share_P /= self.share_P.sum()
        self.num_routed = num_routed

    def tokens(self, number: int) -> np.ndarray:
        return self.paths_PLK[self.rng.choice(len(self.share_P), size=number, p=self.share_P)]

    def drift(self) -> None:
        self.rng.shuffle(self.share_P[:64])  # of the paths that were the most popular

    def load(self, number: int = 20_000) -> np.ndarray:
        """Rows of each unit [L, R], as a running deployment would have counted them."""
        return rows_of(self.tokens(number), self.num_routed) + 1e-3


def rows_of(ids_TLK: np.ndarray, num_routed: int) -> np.ndarray:
    num_layers = ids_TLK.shape[1]
    units = ids_TLK + np.arange(num_layers)[:, None] * num_routed
    return np.bincount(units.reshape(-1), minlength=num_layers * num_routed).reshape(num_layers, num_routed)


def placement(way: str, load_LR: np.ndarray, num_hosts: int, spare: float) -> Placement:
    strategy = way.partition(" ")[0]
    replicas = spare if "copies" in way else 0.0
    return place([load_LR.shape[1]] * len(load_LR), num_hosts, strategy, load_LR=load_LR, replicas=replicas)


def hosts_for(way: str, copies_LRC: np.ndarray, ids_TLK: np.ndarray, num_hosts: int, costs: Costs) -> np.ndarray:
    """The hosts of a step, as the planner takes them."""
    if not way.endswith(("shared", "chosen")):
        return copies_LRC[..., 0]
    rows_LR = rows_of(ids_TLK, copies_LRC.shape[1])
    if way.endswith("chosen"):
        return choose_hosts(copies_LRC, rows_LR, num_hosts, costs.unit_s, costs.row_s)
    rows_LRC = share_rows(copies_LRC, rows_LR, num_hosts, costs.unit_s, costs.row_s)
    return hosts_of_pairs(ids_TLK, copies_LRC, rows_LRC)


def work(ids_TLK: np.ndarray, hosts_of: np.ndarray, num_hosts: int, num_routed: int, costs: Costs) -> tuple[Any, Any]:
    """Rows, and seconds, of every host in every layer [L, H]."""
    num_layers = ids_TLK.shape[1]
    layer = np.broadcast_to(np.arange(num_layers)[:, None], ids_TLK.shape)
    host = hosts_of if hosts_of.ndim == 3 else hosts_of[layer, ids_TLK]
    group, size = layer.astype(np.int64) * num_hosts + host, num_layers * num_hosts
    units = np.unique(group * num_routed + ids_TLK) // num_routed
    rows_LH, units_LH = (np.bincount(x, minlength=size).reshape(num_layers, -1) for x in (group.reshape(-1), units))
    return rows_LH, rows_LH * costs.row_s + units_LH * costs.unit_s


def skewed(args: argparse.Namespace, costs: Costs) -> list[dict[str, Any]]:
    """Each way of placing and choosing, on the same steps."""
    found = []
    for k, tokens, num_hosts in [(k, t, h) for k in (1, 4) for t in (64, 512) for h in (4, 8)]:
        traffic = Traffic(16, 64, k, seed=1)
        load_LR = traffic.load()
        steps = [traffic.tokens(tokens) for _ in range(args.steps)]
        for way in WAYS:
            copies_LRC = placement(way, load_LR, num_hosts, args.spare).copies
            rows, times, choosing, total_H = np.zeros(2), np.zeros(2), list[float](), np.zeros(num_hosts)
            for ids in steps:
                call = functools.partial(hosts_for, way, copies_LRC, ids, num_hosts, costs)
                rows_LH, time_LH = work(ids, timed(choosing, call), num_hosts, 64, costs)
                rows += rows_LH.max(axis=1).sum(), rows_LH.mean(axis=1).sum()
                times += time_LH.max(axis=1).sum(), time_LH.mean(axis=1).sum()
                total_H += rows_LH.sum(axis=0)
            seconds = times[0] + args.steps * 16 * ROUND_TRIP_S
            found.append(
                {"experts_a_token": k, "step_tokens": tokens, "hosts": num_hosts, "way": way}
                | {"rows_of_a_layer": rows[0] / rows[1], "time_of_a_layer": times[0] / times[1]}
                | {"rows_in_all": total_H.max() / total_H.mean(), "tokens_per_s": tokens * args.steps / seconds}
                | {"choose_ms": float(np.median(choosing)) * 1e3}
            )
    return found


@dataclass(frozen=True)
class Known:
    """All paths of a request; to the scheduler its `paths`."""

    ids_TLK: np.ndarray
    nbytes: int = 0

    def slice(self, start: int, stop: int) -> Paths:
        return Paths(self.ids_TLK[start:stop])


class Requests:
    """So many requests of the real scheduler: prompts, then tokens; whoever ends is followed by another."""

    def __init__(self, args: argparse.Namespace, traffic: Traffic) -> None:
        limits = SchedulerLimits(args.requests, args.requests, args.step_tokens, max_queued_tokens=1 << 40)
        self.scheduler = Scheduler(limits, BlockAllocator(args.requests * 8, 16), prefix_sharing=False)
        cut = LayerCut(traffic.num_routed, 0, traffic.paths_PLK.shape[2], 1)
        self.lookahead = Lookahead([cut] * traffic.paths_PLK.shape[1], args.step_tokens)
        self.rng, self.number = np.random.default_rng(0), 0
        self.known = traffic.tokens(50_000)
        for _ in range(args.requests):
            self.add()

    def add(self) -> None:
        prompt, answer = int(self.rng.integers(4, 33)), int(self.rng.integers(16, 65))
        start = int(self.rng.integers(0, len(self.known) - 128))
        params, self.number = SamplingParams(answer), self.number + 1
        made = Sequence(str(self.number), [0] * prompt, prompt, answer, params, 0, None, np.zeros(1))
        known: Any = Known(self.known[start : start + prompt + answer])
        made.paths = known
        self.scheduler.add(made)

    def step(self) -> tuple[np.ndarray, float]:
        """A step's paths, and the seconds the scheduler took for it."""
        times: list[float] = []
        step = timed(times, self.scheduler.next_step)
        paths = [p.sequence.paths.slice(p.sequence.num_computed, p.stop).ids for p in step]
        sampling = [p.sequence for p in step if p.samples]
        timed(times, lambda: self.scheduler.complete(step))
        for sequence in sampling:
            sequence.token_ids.append(0)
            if sequence.num_generated >= sequence.max_tokens:
                self.scheduler.remove(sequence)
                self.add()
        return np.concatenate(paths), sum(times)


def timed(times: list[float], call: Callable[[], Any]) -> Any:
    """Call it; add the seconds of this thread's processor, which other work beside it does not lengthen much."""
    start_s = time.thread_time()
    made = call()
    times.append(time.thread_time() - start_s)
    return made


def scaled(args: argparse.Namespace, costs: Costs, num_hosts: int) -> dict[str, Any]:
    """A model of many experts a layer on so many hosts."""
    traffic = Traffic(args.layers, args.experts, args.k, seed=2, num_paths=1024)
    load_LR, way, placed = traffic.load(), WAYS[-1], list[float]()
    now = timed(placed, lambda: placement(way, load_LR, num_hosts, args.spare))
    linear = placement("linear", load_LR, num_hosts, 0)
    requests, times = Requests(args, traffic), defaultdict[str, list[float]](list)
    busy, linear_s, total_H = np.zeros(2), 0.0, np.zeros(num_hosts)
    for number in range(args.steps):
        ids, took_s = requests.step()
        times["schedule"].append(took_s)
        choose = functools.partial(hosts_for, way, now.copies, ids, num_hosts, costs)
        hosts_of = timed(times["choose"], choose)
        plan = timed(times["plan"], functools.partial(make_plan, 0, ids, hosts_of, num_hosts, args.experts))
        timed(times["messages"], functools.partial(getattr, plan, "hosts"))
        timed(times["groups"], functools.partial(list, plan.layers))
        if number % 4 == 0:
            s = requests.scheduler
            expect = functools.partial(requests.lookahead.expect, 1, s.running, s.waiting, {})
            timed(times["lookahead"], expect)
        rows_LH, time_LH = work(ids, hosts_of, num_hosts, args.experts, costs)
        busy += time_LH.max(axis=1).sum(), time_LH.mean(axis=1).sum()
        total_H += rows_LH.sum(axis=0)
        linear_s += work(ids, linear.hosts_of, num_hosts, args.experts, costs)[1].max(axis=1).sum()
    around_s, num_tokens = args.steps * args.layers * ROUND_TRIP_S, args.steps * args.step_tokens
    return {
        "hosts": num_hosts,
        "place_s": placed[0],
        "ms": {name: {"median": float(np.median(t)) * 1e3, "least": min(t) * 1e3} for name, t in times.items()},
        "tokens_per_s": num_tokens / (busy[0] + around_s),
        "tokens_per_s_linear": num_tokens / (linear_s + around_s),
        "time_of_a_layer": busy[0] / busy[1],
        "rows_in_all": total_H.max() / total_H.mean(),
        **loss(args, costs, traffic, now, busy[0] / args.steps),
    }


def loss(args: argparse.Namespace, costs: Costs, traffic: Traffic, now: Placement, before_s: float) -> dict[str, Any]:
    """A hundredth of the hosts, one at least, go: what survivors load, and how long a step takes then; its first, in
    which whoever is asked for a unit it lacks loads that, by itself."""
    num_lost = -(-now.num_hosts // 100)
    if now.num_hosts == 1:
        return {"lost": None}
    alive_H = np.ones(now.num_hosts, dtype=bool)
    alive_H[np.random.default_rng(0).choice(now.num_hosts, size=num_lost, replace=False)] = False
    copies_LRC = adopt(now.copies, alive_H)
    orphan_LR = ~((now.copies >= 0) & alive_H[now.copies]).any(axis=2)
    after_s, first_s = 0.0, 0.0
    for number in range(args.steps):
        ids = traffic.tokens(args.step_tokens)
        hosts_of = hosts_for(WAYS[-1], copies_LRC, ids, now.num_hosts, costs)
        time_LH = work(ids, hosts_of, now.num_hosts, args.experts, costs)[1]
        after_s += time_LH.max(axis=1).sum()
        if number == 0:
            layer, unit = np.nonzero((rows_of(ids, args.experts) > 0) & orphan_LR)
            np.add.at(time_LH, (layer, copies_LRC[layer, unit, 0]), costs.unit_bytes * costs.load_byte_s)
            first_s = time_LH.max(axis=1).sum()
    return {
        "lost": num_lost,
        "lost_units": int(orphan_LR.sum()),
        "lost_mb": int(orphan_LR.sum()) * costs.unit_bytes / 1e6,
        "step_after_loss": after_s / args.steps / before_s,
        "first_step_after_loss": first_s / before_s,
    }


def rebalanced(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Other paths become popular: the slowest hosts' load, in means, after so many units were loaded anew."""
    traffic, num_hosts = Traffic(16, 64, 1, seed=1), 8
    now = placement(WAYS[-1], traffic.load(), num_hosts, args.spare)
    traffic.drift()
    load_LR, found, loaded = traffic.load(), [], 0
    new = placement(WAYS[-1], load_LR, num_hosts, args.spare)
    while True:
        slowest = slowest_load(now, load_LR).sum() * num_hosts / load_LR.sum()
        found.append({"units_loaded": loaded, "slowest_over_mean": slowest})
        made = moves(now, new, 16, load_LR, 0.02)
        if not made:
            return found
        now, loaded = moved(now, made), loaded + sum(m.target >= 0 for m in made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="*", default=HOSTS)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--step-tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=1024)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--spare", type=float, default=0.25, help="copies, as a share of all units")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    costs, around = measured(args.out), surroundings("scale")
    made: dict[str, Any] = {
        "around": around,
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "costs": {"row_s": costs.row_s, "byte_s": costs.byte_s, "load_byte_s": costs.load_byte_s}
        | {"unit_bytes": costs.unit_bytes, "unit_s": costs.unit_s, "round_trip_s": ROUND_TRIP_S, "shape": SHAPE},
        "skewed": skewed(args, costs),
        "rebalanced": rebalanced(args),
        "scaled": [scaled(args, costs, num_hosts) for num_hosts in args.hosts],
    }
    (args.out / "scale.json").write_text(json.dumps(made, indent=1) + "\n")
    (args.out / "scale.md").write_text(markdown(made))
    draw(made, args.out / "scale.png")


if __name__ == "__main__":
    main()

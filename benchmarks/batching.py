"""Batches by path against first come, first served: what a step asks for, throughput and delays, in simulated time.

The scheduler, the batcher and the block allocator are those that serve; paths are those of a real path router on real
texts, prompt and answer (the texts' own continuation); arrivals and lengths are a trace's, clipped to the context. The
clock alone is simulated: a step takes what `PathBatcher.step_s` says for measured constants (`--costs`, what a server
says at its start with `--batching path`), with the units that are resident; so steps have nothing to teach. Where not
all are, each host keeps those of the units that were there or were loaded which most of the known next tokens ask for.
Prints rows of a table.

    python -m benchmarks.batching --model CHECKPOINT --costs costs.json --shared-folder ../shared
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pregate.cli.load.arrivals import Arrival, clipped, read_trace
from pregate.cluster.placement import place
from pregate.model.paths import Paths
from pregate.router.engine.batching import PathBatcher, StepCosts, UnitLayout
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits, Slice
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_check import check_step
from pregate.router.link.messages import SamplingParams

POLICIES = ("path", "fifo", "decode-first", "prefill-first")
COSTS = ("row_s", "resident_byte_s", "missing_byte_s")
#: Characters of a kind of text that prompts are cut from.
_POOL_BYTES = 200_000
HEAD = """| hosts | resident | load | policy | units | tokens a step | tokens/s | answer p50, p95 | hits |
| --: | --: | --: | --- | --: | --: | --: | --: | --: |"""
TEXTS = ("stories", "fiction", "nonfiction", "verse", "math", "wiki")


@dataclass(frozen=True)
class Text:
    """A request: the paths [T, L, K] of prompt and answer, when it comes and how long it is. To the scheduler it is the
    sequence's `paths`."""

    arrival: Arrival
    ids_TLK: np.ndarray
    nbytes: int = 0

    def slice(self, start: int, stop: int) -> Paths:
        return Paths(self.ids_TLK[start:stop])


@dataclass(frozen=True)
class Setting:
    """What a run is made of."""

    policy: str
    num_hosts: int
    resident: float
    step_tokens: int
    max_running: int
    speed: float
    delay_s: float


class Residency:
    """Which units are there, of each host the same share; a step loads the others it asks for."""

    def __init__(self, layout: UnitLayout, share: float, seed: int = 0) -> None:
        self.layout, rng = layout, np.random.default_rng(seed)
        self.here_U = np.ones(layout.num_units, dtype=bool)
        self._room = {h: max(1, int((layout.host_U == h).sum() * share)) for h in range(layout.num_hosts)}
        self.hits = self.misses = 0
        if share < 1:
            self.keep(rng.random(layout.num_units), np.ones(layout.num_units, dtype=bool))

    def asked(self, used_U: np.ndarray, wanted_U: np.ndarray) -> None:
        """A step has used these units; `wanted_U`: how many of the known next tokens ask for each."""
        self.hits += int((used_U & self.here_U).sum())
        self.misses += int((used_U & ~self.here_U).sum())
        if not self.here_U.all():
            self.keep(wanted_U.astype(float), self.here_U | used_U)

    def keep(self, value_U: np.ndarray, there_U: np.ndarray) -> None:
        """Of the units that are there keep the most valuable ones, on each host as many as it has room for."""
        here_U = np.zeros_like(there_U)
        for host, room in self._room.items():
            units = np.flatnonzero(there_U & (self.layout.host_U == host))
            here_U[units[np.argsort(-value_U[units], kind="stable")[:room]]] = True
        self.here_U = here_U


class Simulation:
    """All requests to their end, in a clock that a step moves on by what it is thought to take."""

    def __init__(self, setting: Setting, texts: Many[Text], layout: UnitLayout, costs: StepCosts, context: int) -> None:
        self.setting, self.layout = setting, layout
        self.world = PathBatcher(layout, costs)  # what steps take, whoever chooses them
        self.residency = Residency(layout, setting.resident)
        limits = SchedulerLimits(
            setting.max_running,
            len(texts),
            setting.step_tokens,
            max_queued_tokens=1 << 40,
            max_queued_bytes=1 << 50,
            max_batching_delay_s=setting.delay_s,
        )
        allocator = BlockAllocator(setting.max_running * -(-context // 16), 16)
        batcher, by = (PathBatcher(layout, costs), "fifo") if setting.policy == "path" else (None, setting.policy)
        self.scheduler = Scheduler(limits, allocator, False, by, batcher)  # pyright: ignore[reportArgumentType]
        self.todo = sorted(texts, key=lambda text: text.arrival.arrival_s)
        self.num_output = sum(text.arrival.output_tokens for text in texts)
        self.rows_TU: dict[str, np.ndarray] = {}
        self.came_s: dict[str, float] = {}
        self.now_s = 0.0
        self.tokens: list[int] = []
        self.units: list[int] = []
        self.answer_s: list[float] = []

    def run(self) -> dict[str, Any]:
        """Run; returns figures, times in seconds of the simulated clock."""
        while self.todo or self.scheduler.running or self.scheduler.waiting:
            self._arrive()
            scheduler, residency = self.scheduler, self.residency
            if scheduler.batcher is not None:
                scheduler.batcher.resident_U = residency.here_U
            step = scheduler.next_step(self.now_s)
            if not step:
                self.now_s = max(self.now_s, self.todo[0].arrival.arrival_s / self.setting.speed)
                continue
            if len(self.tokens) % 97 == 0:
                check_step(step, scheduler)
            sampling = [p.sequence for p in step if p.samples]
            rows_U = self._compute(step)
            for sequence in sampling:
                if self._sample(sequence):
                    scheduler.remove(sequence)
            residency.asked(rows_U > 0, self._wanted())
        return self._figures()

    def _arrive(self) -> None:
        while self.todo and self.todo[0].arrival.arrival_s / self.setting.speed <= self.now_s:
            text = self.todo.pop(0)
            a, name = text.arrival, str(len(self.todo))
            params = SamplingParams(a.output_tokens)
            one = Sequence(name, [0] * a.prompt_tokens, a.prompt_tokens, a.output_tokens, params, 0, None, np.zeros(1))
            one.paths = text  # pyright: ignore[reportAttributeAccessIssue]
            self.rows_TU[name] = self.layout.rows_each(text.ids_TLK)
            self.came_s[name] = a.arrival_s / self.setting.speed
            self.scheduler.add(one, self.now_s)

    def _compute(self, step: Many[Slice]) -> np.ndarray:
        """Let the clock run for the step; return the rows it asked of each unit."""
        rows = [self.rows_TU[p.sequence.request_id][p.sequence.num_computed : p.stop] for p in step]
        rows_U = np.concatenate(rows).sum(axis=0, dtype=np.int64)
        num_tokens = sum(p.num_tokens for p in step)
        self.world.resident_U = self.residency.here_U
        self.now_s += self.world.step_s(rows_U, num_tokens)
        self.tokens.append(num_tokens)
        self.units.append(int((rows_U > 0).sum()))
        self.scheduler.complete(step)
        return rows_U

    def _sample(self, sequence: Sequence) -> bool:
        """Append the text's own next token; True where it was the last."""
        place = len(sequence.token_ids)
        sequence.token_ids.append(0)
        if sequence.num_generated < sequence.max_tokens:
            sequence.next_rows_U = self.rows_TU[sequence.request_id][place]
            return False
        del self.rows_TU[sequence.request_id]
        self.answer_s.append(self.now_s - self.came_s[sequence.request_id])
        return True

    def _wanted(self) -> np.ndarray:
        """How many of the known next tokens ask for each unit."""
        known = [s.next_rows_U for s in self.scheduler.running if s.num_pending == 1 and s.next_rows_U is not None]
        if self.setting.resident == 1 or not known:
            return np.zeros(self.layout.num_units)
        return np.stack(known).sum(axis=0)

    def _figures(self) -> dict[str, Any]:
        hits, misses = self.residency.hits, self.residency.misses
        return asdict(self.setting) | {
            "ended": len(self.answer_s),
            "steps": len(self.tokens),
            "seconds": self.now_s,
            "tokens_per_step": float(np.mean(self.tokens)),
            "units_per_step_and_layer": float(np.mean(self.units)) / len(self.layout.start_L),
            "output_tokens_per_s": self.num_output / self.now_s,
            "hit_rate": hits / max(1, hits + misses),
            "answer_s": {"p50": np.percentile(self.answer_s, 50), "p95": np.percentile(self.answer_s, 95)},
        }


def read_texts(shared: Path, model: Path, arrivals: Many[Arrival], seed: int) -> list[Text]:
    """Each arrival's prompt and answer out of a file of each kind of text in turn, and their paths."""
    from pregate.convert.text.documents import read_documents, text_files
    from pregate.model.checkpoint import CheckpointReader
    from pregate.model.path_computer import PathComputer
    from pregate.model.tokenizer import read_tokenizer
    from pregate.router.paths.load import load_router

    tokenizer, rng = read_tokenizer(model), random.Random(seed)
    computer = PathComputer(load_router(CheckpointReader(model)))
    pools = []
    for kind in TEXTS:
        files = sorted(text_files([shared / "text" / kind], "--shared-folder"), key=lambda file: file.stat().st_size)
        file = next((f for f in files if f.stat().st_size > _POOL_BYTES), files[-1])
        text = "\n\n".join(d.text for d in read_documents([file], 1024, "--shared-folder"))[:_POOL_BYTES]
        pools.append(tokenizer.encode(text, add_special_tokens=False).ids)
    texts = []
    for number, arrival in enumerate(arrivals):
        pool, length = pools[number % len(pools)], arrival.prompt_tokens + arrival.output_tokens
        start = rng.randrange(len(pool) - length)
        (paths,), _ = computer.extend([computer.new_state()], [pool[start : start + length]])
        texts.append(Text(arrival, paths.ids))
    return texts


@dataclass(frozen=True)
class Work:
    """Requests, and the model they go through: routed experts and bytes of a unit, layer by layer."""

    texts: list[Text]
    num_routed: list[int]
    unit_bytes: list[int]

    def of_layers(self, num_layers: int) -> Work:
        """The same where there is one index for so many layers."""
        texts = [replace(text, ids_TLK=np.repeat(text.ids_TLK[:, :1], num_layers, axis=1)) for text in self.texts]
        return Work(texts, self.num_routed[:1] * num_layers, self.unit_bytes[:1] * num_layers)


def read_work(file: Path | None, shared: Path, model: Path, arrivals: Many[Arrival]) -> Work:
    """Out of `file` where it is there, else computed and written to it: paths take longer than all that follows."""
    if file is None or not file.is_file():
        from pregate.model.checkpoint import CheckpointReader

        reader = CheckpointReader(model)
        num_routed = [cut.num_routed for cut in reader.config.cuts]
        unit_bytes = [reader.unit_bytes(layer) for layer in range(reader.num_layers)]
        work = Work(read_texts(shared, model, arrivals, seed=0), num_routed, unit_bytes)
        if file is not None:
            ids_TLK = np.concatenate([text.ids_TLK for text in work.texts])
            np.savez_compressed(file, ids_TLK=ids_TLK, num_routed=num_routed, unit_bytes=unit_bytes)
        return work
    known = np.load(file)
    ends = np.cumsum([a.prompt_tokens + a.output_tokens for a in arrivals])
    if len(known["ids_TLK"]) < ends[-1]:
        raise SystemExit(f"{file} holds paths of fewer requests; remove it")
    parts = np.split(known["ids_TLK"][: ends[-1]], ends[:-1])
    texts = [Text(a, part) for a, part in zip(arrivals, parts, strict=True)]
    return Work(texts, known["num_routed"].tolist(), known["unit_bytes"].tolist())


def run(setting: Setting, work: Work, costs: dict[str, Any], context: int) -> dict[str, Any]:
    """One setting, from constants that hold for every host. Where there are more hosts than experts in a layer, each
    has its share of all units, and in some layers none."""
    how = "linear" if setting.num_hosts <= min(work.num_routed) else "balanced"
    hosts_of_LR = place(work.num_routed, setting.num_hosts, how).hosts_of
    layout = UnitLayout(hosts_of_LR, costs.get("unit_bytes") or work.unit_bytes, setting.num_hosts)
    way = costs["dispatch_s" if setting.num_hosts == 1 else "remote_dispatch_s"]
    row_s, byte_s, missing_s = ((costs[name],) * setting.num_hosts for name in COSTS)
    made = StepCosts(row_s, byte_s, missing_s, way, costs["step_s"], costs["token_s"])
    return Simulation(setting, work.texts, layout, made, context).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--shared-folder", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=384, help="of a prompt at most")
    parser.add_argument("--step-tokens", type=int, default=64)
    parser.add_argument("--max-running", type=int, default=128)
    parser.add_argument("--hosts", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--resident", type=float, nargs="*", default=[1.0, 0.25])
    parser.add_argument("--loads", type=float, nargs="*", default=[0.8, 1.2], help="of what fifo can bear")
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--delay", type=float, default=0.5)
    parser.add_argument(
        "--paths", type=Path, help=".npz of the requests' paths: read, or written where it is not there"
    )
    parser.add_argument("--layers", type=int, help="an index that holds for all layers is that of so many")
    given = parser.parse_args()
    costs = json.loads(given.costs.read_text())
    trace = read_trace(given.shared_folder / "traces" / "azure2023_conv.csv")[: given.requests]
    arrivals, _ = clipped(trace, given.context, given.prompt_tokens, given.context // 4)
    work = read_work(given.paths, given.shared_folder, given.model, arrivals)
    if given.layers:
        work = work.of_layers(given.layers)
    print(HEAD)
    for hosts, resident in product(given.hosts, given.resident):
        base = Setting("fifo", hosts, resident, given.step_tokens, given.max_running, 1e6, given.delay)
        flood = run(base, work, costs, given.context)
        for load, policy in product(given.loads, given.policies):
            speed = load * arrivals[-1].arrival_s / flood["seconds"]
            print(_row(load, run(replace(base, policy=policy, speed=speed), work, costs, given.context)), flush=True)


def _row(load: float, r: dict[str, Any]) -> str:
    times = r["answer_s"]
    return (
        f"| {r['num_hosts']} | {r['resident']:.0%} | {load:.1f} | {r['policy']} |"
        f" {r['units_per_step_and_layer']:.2f} | {r['tokens_per_step']:.1f} | {r['output_tokens_per_s']:.1f} |"
        f" {times['p50']:.0f}, {times['p95']:.0f} | {r['hit_rate']:.2f} |"
    )


if __name__ == "__main__":
    main()

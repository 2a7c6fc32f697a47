"""Helpers of the served-equality tests: engines over hosts in this process or in processes of their own."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from pregate.cluster.placement import place
from pregate.model.checkpoint import CheckpointReader
from pregate.model.config import RoutedConfig
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter
from pregate.router.engine.build import build_engine
from pregate.router.engine.engine import Engine
from pregate.router.engine.options import EngineOptions
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from pregate.workers.client.host_client import ChannelClient, HostClient, InProcessClient
from pregate.workers.host.actor import ActorOptions, ExpertHostActor
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import HostAddress
from tests.equality import ReferenceText, Tally
from tests.processes import PROCESSES


def weigh_experts(source: Path, path: Path) -> None:
    """Write the tiny checkpoint with paths at `source` to `path`, its experts weighed between about 0.3 and 2.5."""
    model = RoutedForCausalLM.from_pretrained(source).eval()
    assert model.path_router is not None
    shape = replace(model.config.router_shape, weights="learned")
    router = PathRouter(shape, 512, model.config.cuts, model.config.selection)
    router.load_state_dict(model.path_router.state_dict() | {"scale": torch.randn(18).sub(0.2).mul(5)})
    model.path_router = router
    model.config = RoutedConfig.from_dict(model.config.to_dict() | {"path_router": asdict(shape)})
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)


def units_of(hosts_of_LR: np.ndarray, host: int) -> list[tuple[int, int]]:
    return [(int(layer), int(expert)) for layer, expert in np.argwhere(hosts_of_LR == host)]


def host_process(orders, ready) -> None:
    """Be the host each order describes until the next one comes; None ends the process."""
    actor = None
    while True:
        options = orders.get(timeout=3600)  # longer than any test serves: else the host ends in its midst
        if actor is not None:
            actor.stop()
        if options is None:
            return
        actor = ExpertHostActor(options)
        ready.put(actor.start())


class HostProcesses:
    """Processes that are the expert hosts of one checkpoint after another, over ipc: starting them costs seconds."""

    def __init__(self, num_hosts: int, folder: Path) -> None:
        self._folder = folder
        self._ready, self._orders = PROCESSES.Queue(), [PROCESSES.Queue() for _ in range(num_hosts)]
        self._processes = [
            PROCESSES.Process(target=host_process, args=(orders, self._ready), daemon=True) for orders in self._orders
        ]
        for process in self._processes:
            process.start()

    def serve(
        self, path: Path, parent: Path | None = None, copies_LRC: np.ndarray | None = None, **options
    ) -> list[HostAddress]:
        """Hold the units of the checkpoint at `path`, each host its own of a linear placement, or what `copies_LRC`
        says; drop those before. `options` are the hosts'."""
        if copies_LRC is None:
            copies_LRC = placement_of(path, len(self._orders), parent)[..., None]
        for host, orders in enumerate(self._orders):
            actor = ActorOptions(
                host=HostOptions(host_id=host, **options),
                checkpoint=str(path),
                parent=None if parent is None else str(parent),
                units=tuple(units_of((copies_LRC == host).any(axis=2), True)),
                ipc_folder=str(self._folder),
                bind_address="127.0.0.1",
                heartbeat_s=0.1,
            )
            orders.put(actor)
        try:
            addresses = [self._ready.get(timeout=300) for _ in self._orders]
        except queue.Empty as error:
            raise TimeoutError("host processes did not start within 300 s") from error
        return sorted(addresses, key=lambda a: a.host_id)

    def close(self) -> None:
        for orders, process in zip(self._orders, self._processes, strict=True):
            orders.put(None)
            process.join(timeout=20)
            process.kill()


@contextmanager
def expert_hosts(
    path: Path, num_hosts: int, folder: Path, parent: Path | None = None, **options
) -> Iterator[list[HostAddress]]:
    """Start `num_hosts` host processes over ipc; `options` as `HostProcesses.serve` takes them."""
    processes = HostProcesses(num_hosts, folder)
    try:
        yield processes.serve(path, parent, **options)
    finally:
        processes.close()


def placement_of(path: Path, num_hosts: int, parent: Path | None = None) -> np.ndarray:
    reader = CheckpointReader(path, parent)
    return place([c.num_routed for c in reader.config.cuts], num_hosts, "linear").hosts_of


def hosts_here(path: Path, num_hosts: int, parent: Path | None = None, **options) -> list[InProcessClient]:
    """That many hosts in this process, each with its own units of a linear placement."""
    hosts_of = placement_of(path, num_hosts, parent)
    return [
        InProcessClient(
            ExpertHost(CheckpointReader(path, parent), units_of(hosts_of, n), HostOptions(host_id=n, **options))
        )
        for n in range(num_hosts)
    ]


@contextmanager
def engine_of(
    path: Path,
    clients: Sequence[HostClient],
    parent: Path | None = None,
    copies_LRC: np.ndarray | None = None,
    **options,
) -> Iterator[Engine]:
    """An engine in this process over these hosts, which it leaves at the end; units as in `HostProcesses.serve`."""
    if copies_LRC is None:
        copies_LRC = placement_of(path, len(clients), parent)[..., None]
    try:
        built = EngineOptions(model=str(path), parent=None if parent is None else str(parent), **options)
        yield build_engine(built, clients, copies_LRC)
    finally:
        for client in clients:
            client.close()


def engine_over(
    path: Path, addresses: list[HostAddress], parent: Path | None = None, **options
) -> AbstractContextManager[Engine]:
    """An engine in this process over channels to these hosts; without any, over one host in this process.

    Hosts may be fewer than were started: then they load the others' units when first asked.
    """
    return engine_of(path, [ChannelClient(a) for a in addresses] or hosts_here(path, 1, parent), parent, **options)


def engine_in_process(path: Path, num_hosts: int) -> AbstractContextManager[Engine]:
    """An engine over that many hosts, all in this process."""
    return engine_of(path, hosts_here(path, num_hosts), step_tokens=40)


@dataclass
class Served:
    """What an engine produced: per request its tokens, its logits [n, V], and the path of every input token."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    paths: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)


class Recorder:
    """Watches an engine's steps from outside: logits of sampled rows, and the ids each layer was dispatched with."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.served = engine, Served()
        self._run, self._dispatch = engine.runner.run, engine.exchange.dispatch
        self._layers: dict[int, np.ndarray] = {}
        engine.runner.run = self._watch_run
        engine.exchange.dispatch = self._watch_dispatch

    def stop(self) -> None:
        """Watch no longer."""
        self.engine.runner.run, self.engine.exchange.dispatch = self._run, self._dispatch

    def _watch_dispatch(self, layer, x_TD, choice=None):
        if choice is not None:
            self._layers[layer] = choice.ids.numpy()
        return self._dispatch(layer, x_TD, choice)

    def _watch_run(self, number, step, paths):
        self._layers = {}
        result = self._run(number, step, paths)
        for row, sequence in zip(result.logits_BV, result.sampled, strict=True):
            self.served.logits.setdefault(sequence.request_id, []).append(row.clone())
        self._note_paths(step)
        return result

    def _note_paths(self, batch):
        row = 0
        for piece in batch:
            known = self.served.paths.setdefault(piece.sequence.request_id, {})
            if self.engine.exact:
                known.update(enumerate(piece.sequence.paths.slice(0, piece.stop).ids))
            else:
                start = piece.sequence.num_computed
                known.update({start + n: self._row(row + n) for n in range(piece.num_tokens)})
            row += piece.num_tokens

    def _row(self, row: int) -> np.ndarray:
        """What every layer was dispatched with for one row [L, K]; a layer of fewer experts is filled up with -1."""
        rows = [self._layers[layer][row] for layer in sorted(self._layers)]
        widest = max(map(len, rows))
        return np.stack([np.pad(ids, (0, widest - len(ids)), constant_values=-1) for ids in rows])


def serve(engine: Engine, prompts: list[list[int]], max_tokens: int, *, together: bool) -> Served:
    """Run every prompt greedily, one by one or all at once."""
    recorder = Recorder(engine)
    for index, prompt in enumerate(prompts):
        engine.submit(SubmitRequest(str(index), tuple(prompt), SamplingParams(max_tokens, ignore_eos=True)))
        if not together:
            drain(engine, recorder.served)
    drain(engine, recorder.served)
    return recorder.served


def drain(engine: Engine, served: Served) -> None:
    for _ in range(100_000):
        if not engine.has_work:
            return
        for event in engine.step():
            if isinstance(event, TokensEvent):
                served.tokens.setdefault(event.request_id, []).extend(event.token_ids)
    raise AssertionError("the engine did not come to an end")


def compare(tally: Tally, name: str, references: list[ReferenceText], served: Served) -> None:
    """Hold everything an engine produced to the reference texts."""
    for index, reference in enumerate(references):
        key, label = str(index), f"{name} prompt {index}"
        same = leading_equal(reference.tokens, served.tokens[key])
        found = served.paths[key]
        num_inputs = min(max(found) + 1, len(reference.prompt) + same)  # later inputs are another text
        # What an equal prompt had computed has no paths of its own where gates decide.
        paths = np.stack([found.get(p, reference.paths[p]) for p in range(num_inputs)]).astype(np.int64)
        agreed = tally.compare_paths(label, reference, paths)
        # Input token t gives the logits of generated position t - (prompt - 1).
        part = shortened(reference, max(0, agreed - len(reference.prompt) + 1)) if agreed < len(paths) else reference
        same = tally.compare_text(label, part, served.tokens[key][: len(part.tokens)])
        tally.compare_logits(label, part, torch.stack(served.logits[key]), same)


def hold(engine: Engine, name: str, references: list[ReferenceText], together: Sequence[bool] = (False, True)) -> Tally:
    """Serve the references' prompts, one by one and all at once, and hold what comes to them.

    AssertionError when anything differs without excuse.
    """
    tally, num_tokens = Tally(), len(references[0].tokens)
    prompts = [reference.prompt for reference in references]
    for at_once in together:
        compare(tally, name, references, serve(engine, prompts, num_tokens, together=at_once))
    tally.check()
    return tally


def leading_equal(ours: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))


def shortened(reference: ReferenceText, num_tokens: int) -> ReferenceText:
    """The part of a reference before a path that was excused."""
    return ReferenceText(
        reference.prompt,
        reference.tokens[:num_tokens],
        reference.logits[:num_tokens],
        reference.margin[:num_tokens],
        reference.paths,
        reference.path_margin,
    )

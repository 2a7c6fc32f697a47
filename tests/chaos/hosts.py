"""Expert hosts in processes of their own that are killed, stopped and replaced while an engine serves over them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pregate.base.errors import HostLostError
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.engine import Engine
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from pregate.workers.client.channel import ChannelClient
from pregate.workers.client.channel_options import ChannelOptions
from pregate.workers.host.actor import ActorOptions
from pregate.workers.host.options import HostOptions
from pregate.workers.link.protocol import HostAddress
from tests.equality import ReferenceText, Tally, reference_texts
from tests.processes import PROCESSES
from tests.router.serving import Recorder, Served, compare, host_process

QUICK = ChannelOptions(host_timeout_s=1.5, cut_timeout_s=0.3)


class Cluster:
    """One process a host, and one spare that takes the place of the next that is killed: starting one takes seconds.

    `copies_LRC`: who holds which units. `addresses` and `pids` are of the hosts now.
    """

    def __init__(self, path: Path, copies_LRC: np.ndarray, folder: Path, **options) -> None:
        self._path, self._copies_LRC, self._folder, self._options = path, copies_LRC, folder, options
        self._ready = PROCESSES.Queue()
        self.num_hosts = int(copies_LRC.max()) + 1
        self._all: list = []
        self._spares = [self._process() for _ in range(self.num_hosts + 1)]
        self.processes: list = [None] * self.num_hosts
        self.addresses: list[HostAddress] = [self.start(host) for host in range(self.num_hosts)]

    def _process(self):
        orders = PROCESSES.Queue()
        process = PROCESSES.Process(target=host_process, args=(orders, self._ready), daemon=True)
        process.start()
        self._all.append(process)
        return process, orders

    def start(self, host: int) -> HostAddress:
        """Let the spare process be a host; returns where it listens."""
        process, orders = self._spares.pop(0)
        held_LR = (self._copies_LRC == host).any(axis=2)
        units = tuple((int(layer), int(expert)) for layer, expert in np.argwhere(held_LR))
        spare_slots = -(-len(units) // max(1, self.num_hosts - 1))
        orders.put(
            ActorOptions(
                host=HostOptions(host_id=host, spare_slots=spare_slots, **self._options),
                checkpoint=str(self._path),
                units=units,
                ipc_folder=str(self._folder),
                heartbeat_s=0.2,
            )
        )
        address = self._ready.get(timeout=240)
        assert address.host_id == host and address.pid == process.pid
        self.processes[host] = process
        return address

    def kill(self, host: int) -> None:
        """SIGKILL; returns when the process is dead."""
        process = self.processes[host]
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL

    def replace(self, host: int, engine: Engine) -> None:
        """Start a host that was killed again, as another process, and tell the engine."""
        self._spares.append(self._process())
        self.addresses[host] = self.start(host)
        engine.replace_host(host, self.client(host))

    def client(self, host: int) -> ChannelClient:
        return ChannelClient(self.addresses[host], QUICK)

    def close(self) -> None:
        for process in self._all:
            process.kill()
            process.join(10)


def random_references(path: Path, seed: int, num_prompts: int, num_tokens: int) -> list[ReferenceText]:
    """What the reference makes of prompts of chance, of 5 to 60 tokens."""
    reference, rng = RoutedForCausalLM.from_pretrained(path).eval(), np.random.default_rng(seed)
    vocab_size = reference.config.text_config.vocab_size
    prompts = [[1, *rng.integers(3, vocab_size, size=n).tolist()] for n in rng.integers(4, 60, size=num_prompts)]
    return reference_texts(reference, prompts, num_tokens)


def serve_all(engine: Engine, prompts: list[list[int]], num_tokens: int) -> tuple[Served, float]:
    """Serve all prompts at once, through whatever happens; returns what came and the longest time without a token."""
    recorder = Recorder(engine)
    for index, prompt in enumerate(prompts):
        engine.submit(SubmitRequest(str(index), tuple(prompt), SamplingParams(num_tokens, ignore_eos=True)))
    give_up_s, last_s, longest_s = time.monotonic() + 300, time.monotonic(), 0.0
    try:
        while engine.has_work:
            assert time.monotonic() < give_up_s, f"the engine does not come to an end; lost: {engine.exchange.lost}"
            try:
                events = engine.step()
            except HostLostError:  # nobody is left: the step is tried again, as the engine's server does
                time.sleep(0.05)
                continue
            for event in events:
                if isinstance(event, TokensEvent):
                    recorder.served.tokens.setdefault(event.request_id, []).extend(event.token_ids)
                    longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
    finally:
        recorder.stop()
    return recorder.served, longest_s


def until_all_serve(engine: Engine, timeout_s: float = 60.0) -> None:
    """Look after the hosts, as an idle engine does, until every one of them serves."""
    give_up_s = time.monotonic() + timeout_s
    while engine.exchange.lost:
        assert time.monotonic() < give_up_s, engine.exchange.lost
        with contextlib.suppress(HostLostError):
            engine.idle()
        time.sleep(0.02)


def until_all_is_loaded(engine: Engine) -> None:
    """Look after the hosts, with nothing to do for them, until those that live hold all that they serve."""
    give_up_s, members = time.monotonic() + 60, engine.exchange.members  # type: ignore[attr-defined]
    while members.catching_up:
        assert time.monotonic() < give_up_s, members.adopted
        engine.idle()
        time.sleep(0.02)


def hold_round(engine: Engine, references: list[ReferenceText], name: str) -> float:
    """Serve every prompt once, hold the texts to the reference; returns the longest pause between two tokens."""
    num_tokens = len(references[0].tokens)
    found, longest_s = serve_all(engine, [reference.prompt for reference in references], num_tokens)
    assert all(len(found.tokens[str(n)]) == num_tokens for n in range(len(references))), "a request ended early"
    tally = Tally()
    compare(tally, name, references, found)
    tally.check()
    return longest_s


class At:
    """Does something before the n-th layer of what follows is dispatched: between two layers, in prefill or decode."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._dispatch = engine, engine.exchange.dispatch
        self.num_seen, self._plans = 0, {}
        engine.exchange.dispatch = self._watch

    def do(self, number: int, what: Callable[[], object]) -> None:
        self._plans[self.num_seen + number] = what

    def _watch(self, layer, x_TD, choice=None):
        self.num_seen += 1
        if what := self._plans.pop(self.num_seen, None):
            what()
        return self._dispatch(layer, x_TD, choice)

    def stop(self) -> None:
        self._engine.exchange.dispatch = self._dispatch

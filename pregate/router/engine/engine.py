"""The step loop: batch, plan, forward, sample, publish. One thread, no sockets, no asyncio.

Data at each step: slices of sequences -> token ids, positions [T] and their paths [T, L, K] -> one plan per host ->
logits [B, V] of the rows that end a sequence -> one token each -> the path of that token, before the next step.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pregate.base.errors import HostLostError, PregateError, UserError
from pregate.base.log import get_logger
from pregate.model.checkpoint import CheckpointReader
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.path_router import PathComputer, PathState
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.connect import connect
from pregate.router.engine.exchange import Exchange
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.options import EngineOptions
from pregate.router.engine.sampling import sample
from pregate.router.engine.scheduler import Batcher, BatchLimits, Slice
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_layout import SequenceSlice, StepLayout
from pregate.router.link.messages import FailedEvent, FinishedEvent, SubmitRequest, TokensEvent, check_prompt

if TYPE_CHECKING:
    from pregate.workers.client.host_client import HostClient

logger = get_logger(__name__)
Event = TokensEvent | FinishedEvent | FailedEvent
#: How torch says on the CPU that there is no memory, with an error of no kind of its own.
_NO_MEMORY = "can't allocate memory"


class Engine:
    """Runs requests on a backbone whose experts live on hosts. See the module's docstring for a step."""

    def __init__(
        self, options: EngineOptions, folder: ModelFolder, backbone: Backbone, exchange: Exchange, version: str
    ) -> None:
        self.options, self.backbone, self.exchange, self.version = options, backbone, exchange, version
        self.config = backbone.config
        self.exact = self.config.routing == "path"
        self.context = self.config.context_tokens
        blocks = -(-options.kv_capacity(self.context) // options.block_size)
        self.allocator = BlockAllocator(blocks, options.block_size)
        self.kv = PagedKV(blocks, options.block_size, backbone.kv_shapes, backbone.dtype, backbone.device)
        self.batcher = Batcher(
            BatchLimits(options.max_running, options.max_queued, options.step_tokens), self.allocator
        )
        self.computer = PathComputer(backbone.path_router) if backbone.path_router is not None else None
        self.eos_ids = folder.eos_ids
        self._states: dict[str, PathState] = {}
        self._sequences: dict[str, Sequence] = {}
        self._step_number = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def submit(self, request: SubmitRequest) -> None:
        """Accept a request; its whole prompt's paths are computed here, before it is scheduled.

        Raises UserError (bad prompt or sampling), QueueFullError, or PregateError where memory is lacking.
        """
        vocab_size = self.config.text_config.vocab_size
        request.sampling.validate(vocab_size)
        check_prompt(request.token_ids, vocab_size=vocab_size, max_context=self.context)
        if request.request_id in self._sequences:
            raise UserError.of("request id", request.request_id, "is running already; use a new one")
        num_prompt = len(request.token_ids)
        max_tokens = min(request.sampling.max_tokens, self.context - num_prompt)
        capacity = self.allocator.num_blocks * self.allocator.block_size
        if num_prompt + max_tokens > capacity:
            raise UserError.of("max_tokens", max_tokens, f"with this prompt exceeds the KV cache of {capacity} tokens")
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(62)
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        hosts = np.zeros(len(self.exchange.clients), dtype=np.int64)
        sequence = Sequence(
            request.request_id, list(request.token_ids), num_prompt, max_tokens, request.sampling, seed, deadline,
            hosts,
        )  # fmt: skip
        self.batcher.add(sequence)
        self._sequences[request.request_id] = sequence
        if self.exact:
            try:
                self._begin_paths(sequence)
            except PregateError:
                self._drop(sequence)
                raise

    def _begin_paths(self, sequence: Sequence) -> None:
        assert self.computer is not None
        with _out_of_memory_fails():
            (paths,), (state,) = self.computer.extend([self.computer.new_state()], [sequence.token_ids])
        sequence.paths = paths.with_room(sequence.capacity)
        self._states[sequence.request_id] = state

    def cancel(self, request_id: str) -> None:
        """Drop a request and all it holds; unknown ids are ignored."""
        if request_id in self._sequences:
            self._drop(self._sequences[request_id])

    def _drop(self, sequence: Sequence) -> None:
        self.batcher.remove(sequence)
        self._states.pop(sequence.request_id, None)
        del self._sequences[sequence.request_id]
        if not self._sequences:
            self.allocator.check_idle()

    def route(self, token_ids: Many[int]) -> Paths:
        """Paths of a prompt, without a forward pass.

        Raises UserError when the checkpoint has no path router, PregateError where memory is lacking.
        """
        check_prompt(token_ids, vocab_size=self.config.text_config.vocab_size, max_context=self.context + 1)
        if self.computer is None:
            raise UserError("this checkpoint has no path router; make one with `pregate decouple`")
        with _out_of_memory_fails():
            paths = self.computer.extend([self.computer.new_state()], [list(token_ids)])[0][0]
        return Paths(paths.ids, paths.weights, exact=self.exact)

    def info(self) -> dict[str, Any]:
        """What is served and how busy it is, in plain types."""
        return {
            "model": self.options.name or Path(self.options.model).name,
            "max_context": self.context,
            "vocab_size": int(self.config.text_config.vocab_size),
            "eos_token_ids": sorted(self.eos_ids),
            "version": self.version,
            "routing": self.config.routing,
            "has_path_router": self.computer is not None,
            "num_hosts": len(self.exchange.clients),
            "num_layers": len(self.config.cuts),
            "num_experts": [c.num_routed + c.num_shared for c in self.config.cuts],
            "num_running": len(self.batcher.running),
            "num_queued": len(self.batcher.waiting),
            "num_steps": self._step_number,
            "kv_blocks_free": self.allocator.num_free,
            "kv_blocks": self.allocator.num_blocks,
            "hosts": [{"host_id": h, **vars(c.stats)} for h, c in enumerate(self.exchange.clients)],
        }

    def idle(self) -> None:
        """Take in heartbeats while there is no work; HostLostError when a host is gone."""
        self.exchange.poll()

    def fail_all(self, error: PregateError) -> list[Event]:
        """End every request with `error`; the engine stays usable."""
        return self._fail(list(self._sequences.values()), error)

    def _fail(self, sequences: list[Sequence], error: PregateError) -> list[Event]:
        for sequence in sequences:
            self._drop(sequence)
        return [FailedEvent(s.request_id, error.code, str(error)) for s in sequences]

    def step(self) -> list[Event]:
        """Run one step; returns its events. A failure ends the requests in it and no others.

        Raises HostLostError when a host does not answer: then nothing can be computed.
        """
        events = self._expire(time.monotonic())
        batch = self.batcher.next_batch()
        if not batch:
            return events
        self._step_number += 1
        sampled = [s.sequence for s in batch if s.samples]
        try:
            with _out_of_memory_fails():
                tokens = sample(self._forward(batch), sampled)
        except HostLostError:
            raise
        except PregateError as error:
            return events + self._fail_step([s.sequence for s in batch], error)
        for piece in batch:
            piece.sequence.num_computed += piece.num_tokens
        for sequence, token in zip(sampled, tokens, strict=True):
            events += self._publish(sequence, token)
        running = [s for s in sampled if s.request_id in self._sequences]
        try:
            self._extend_paths(running)
        except PregateError as error:
            events += self._fail_step(running, error)
        return events

    def _fail_step(self, sequences: list[Sequence], error: PregateError) -> list[Event]:
        logger.error("step %d failed: %s", self._step_number, error)
        return self._fail(sequences, error)

    def _expire(self, now_s: float) -> list[Event]:
        late = [s for s in self._sequences.values() if s.deadline_s is not None and s.deadline_s <= now_s]
        for sequence in late:
            self._drop(sequence)
        return [_finished(s, "deadline") for s in late]

    def _forward(self, batch: list[Slice]) -> torch.Tensor:
        ids = [s.sequence.token_ids[s.sequence.num_computed : s.stop] for s in batch]
        positions = [np.arange(s.sequence.num_computed, s.stop) for s in batch]
        token_ids = np.fromiter((t for part in ids for t in part), dtype=np.int64)
        slices = [SequenceSlice(s.sequence.blocks, s.sequence.num_computed, s.stop) for s in batch]
        layout = StepLayout.build(self.kv, slices, self.backbone.device)
        ends = np.cumsum([s.num_tokens for s in batch])
        wanted = [int(end) - 1 for s, end in zip(batch, ends, strict=True) if s.samples]
        self.exchange.begin_step(self._step_number, len(token_ids), self._paths_of(batch))
        logits_BV = self.backbone.forward(token_ids, np.concatenate(positions), layout, wanted)
        counts_TH = self.exchange.end_step()
        for piece, end in zip(batch, ends, strict=True):
            piece.sequence.pairs_per_host += counts_TH[end - piece.num_tokens : end].sum(axis=0)
        return logits_BV

    def _paths_of(self, batch: list[Slice]) -> Paths | None:
        if not self.exact:
            return None
        parts = []
        for piece in batch:
            assert piece.sequence.paths is not None
            parts.append(piece.sequence.paths[piece.sequence.num_computed : piece.stop])
        return Paths.concatenate(parts)

    def _publish(self, sequence: Sequence, token: int) -> list[Event]:
        """Append a sampled token; the end of a sequence frees what it holds."""
        sampling = sequence.sampling
        sequence.token_ids.append(token)
        stopped = token in sampling.stop_token_ids or (token in self.eos_ids and not sampling.ignore_eos)
        events: list[Event] = [] if stopped else [TokensEvent(sequence.request_id, (token,))]
        if stopped or sequence.num_generated >= sequence.max_tokens:
            self._drop(sequence)
            events.append(_finished(sequence, "stop" if stopped else "length"))
        return events

    def _extend_paths(self, sequences: list[Sequence]) -> None:
        """Fix the paths of the tokens just sampled, so that the next step is planned before its backbone starts."""
        if not self.exact or not sequences:
            return
        assert self.computer is not None
        states = [self._states[s.request_id] for s in sequences]
        with _out_of_memory_fails():
            paths, states = self.computer.extend(states, [s.token_ids[-1:] for s in sequences])
        for sequence, path, state in zip(sequences, paths, states, strict=True):
            assert sequence.paths is not None
            num_tokens = len(sequence.token_ids)
            sequence.paths[num_tokens - 1 : num_tokens] = path
            self._states[sequence.request_id] = state


@contextmanager
def _out_of_memory_fails() -> Iterator[None]:
    """PregateError where the block finds no memory; any other RuntimeError is a defect."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _NO_MEMORY not in str(error):
            raise
        raise PregateError(f"out of memory: {error}") from error


def _finished(sequence: Sequence, reason: str) -> FinishedEvent:
    per_host = tuple(int(n) for n in sequence.pairs_per_host)
    return FinishedEvent(sequence.request_id, reason, sequence.num_prompt, sequence.num_generated, per_host)


def build_engine(options: EngineOptions, clients: Many[HostClient], hosts_of_LR: np.ndarray) -> Engine:
    """Load the backbone and join it to its hosts. `hosts_of_LR` int16 [L, R]: each unit's home host.

    Raises CheckpointError for a bad folder, UserError when a host refuses, HostLostError when one does not answer.
    """
    torch.set_num_threads(options.threads)
    folder = read_folder(Path(options.model))
    for note in folder.notes:
        logger.warning("%s: %s", folder.path, note)
    reader = CheckpointReader(options.model)
    exchange = connect(options, clients, hosts_of_LR, reader)
    backbone = Backbone.load(options.model, exchange, options.dtype, options.device)
    exchange.warm_up(options.step_tokens)
    engine = Engine(options, folder, backbone, exchange, reader.fingerprint)
    logger.info("engine of %s: %s routing, %d hosts", options.model, engine.config.routing, len(clients))
    return engine

"""The step loop: schedule, plan, run, sample, publish. One thread, no sockets, no asyncio.

Three parts that know nothing of each other: the scheduler decides which tokens run, `RunningPaths` knows where they go,
the model runner computes them. The engine passes on what one says to the next, and turns it into events.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np

from pregate.base.errors import HostLostError, PregateError, UserError
from pregate.base.log import get_logger
from pregate.base.memory import out_of_memory_fails
from pregate.model.folder import ModelFolder
from pregate.model.path_computer import PathComputer
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.options import EngineOptions
from pregate.router.engine.runner import ModelRunner, StepResult
from pregate.router.engine.running_paths import RunningPaths
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits, Slice, check_step
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import FailedEvent, FinishedEvent, SubmitRequest, TokensEvent, check_prompt

logger = get_logger(__name__)
Event = TokensEvent | FinishedEvent | FailedEvent


class Engine:
    """Runs requests on a backbone whose experts live on hosts. See the module's docstring for a step."""

    def __init__(self, options: EngineOptions, folder: ModelFolder, backbone: Backbone, version: str) -> None:
        self.options, self.exchange, self.version = options, backbone.exchange, version
        self.config = backbone.config
        self.exact = self.config.routing == "path"
        self.context = self.config.context_tokens
        num_blocks = options.kv_blocks(self.context, backbone.kv_token_bytes, backbone.free_bytes)
        lane_blocks = max(1, num_blocks // options.max_running)
        self.runner = ModelRunner(backbone, num_blocks, options.block_size, options.cuda_graphs)
        self.scheduler = Scheduler(
            SchedulerLimits(options.max_running, options.max_queued, options.step_tokens, options.max_queued_bytes),
            BlockAllocator(num_blocks, options.block_size, lane_blocks),
            options.prefix_sharing,
        )
        computer = PathComputer(backbone.path_router) if backbone.path_router is not None else None
        self.computer = computer
        self.paths = RunningPaths(computer) if computer is not None and self.exact else None
        self.eos_ids = folder.eos_ids
        self._sequences: dict[str, Sequence] = {}
        self._step_number = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def submit(self, request: SubmitRequest) -> None:
        """Accept a request; its whole prompt's paths are fixed here, before it is scheduled, unless it brings them.

        Raises UserError (bad prompt or sampling), QueueFullError, or PregateError where memory is lacking.
        """
        vocab_size = self.config.text_config.vocab_size
        request.sampling.validate(vocab_size)
        check_prompt(request.token_ids, vocab_size=vocab_size, max_context=self.context)
        if request.request_id in self._sequences:
            raise UserError.of("request id", request.request_id, "is running already; use a new one")
        num_prompt = len(request.token_ids)
        max_tokens = min(request.sampling.max_tokens, self.context - num_prompt)
        allocator = self.scheduler.allocator
        capacity = allocator.num_blocks * allocator.block_size
        if num_prompt + max_tokens > capacity:
            raise UserError.of("max_tokens", max_tokens, f"with this prompt exceeds the KV cache of {capacity} tokens")
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(62)
        deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        hosts = np.zeros(len(self.exchange.clients), dtype=np.int64)
        sequence = Sequence(
            request.request_id, list(request.token_ids), num_prompt, max_tokens, request.sampling, seed, deadline,
            hosts, request.cache_salt,
        )  # fmt: skip
        self.scheduler.check_room(sequence)
        if self.paths is not None:
            with out_of_memory_fails():
                self.paths.begin(sequence, request)
        try:
            self.scheduler.add(sequence)
        except PregateError:
            self._forget(sequence)
            raise
        self._sequences[request.request_id] = sequence

    def cancel(self, request_id: str) -> None:
        """Drop a request and all it holds; unknown ids are ignored."""
        if request_id in self._sequences:
            self._drop(self._sequences[request_id])

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        self._forget(sequence)
        allocator = self.scheduler.allocator
        assert self._sequences or allocator.num_free == allocator.num_blocks, "KV blocks were lost"

    def _forget(self, sequence: Sequence) -> None:
        if self.paths is not None:
            self.paths.drop(sequence)

    def route(self, token_ids: Many[int]) -> Paths:
        """Paths of a prompt, without a forward pass.

        Raises UserError when the checkpoint has no path router, PregateError where memory is lacking.
        """
        check_prompt(token_ids, vocab_size=self.config.text_config.vocab_size, max_context=self.context + 1)
        if self.computer is None:
            raise UserError("this checkpoint has no path router; make one with `pregate decouple`")
        with out_of_memory_fails():
            paths = self.computer.extend([self.computer.new_state()], [list(token_ids)])[0][0]
        return Paths(paths.ids, paths.weights, exact=self.exact)

    def info(self) -> dict[str, Any]:
        """What is served and how busy it is, in plain types."""
        scheduler, allocator = self.scheduler, self.scheduler.allocator
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
            "num_running": len(scheduler.running),
            "num_queued": len(scheduler.waiting),
            "num_steps": self._step_number,
            "num_preempted": scheduler.num_preempted,
            "prefix_tokens": scheduler.num_matched_tokens,
            "queued_bytes": scheduler.queued_bytes,
            "kv_blocks_free": allocator.num_free,
            "kv_blocks_shared": allocator.num_shared,
            "kv_blocks": allocator.num_blocks,
            "kv_bytes": self.runner.kv.nbytes,
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
        step = self.scheduler.next_step()
        if not step:
            return events
        if self.options.check_steps:
            check_step(step, self.scheduler)
        self._step_number += 1
        paths = None if self.paths is None else self.paths.of_step([(p.sequence, p.num_tokens) for p in step])
        try:
            result = self.runner.run(self._step_number, step, paths)
        except HostLostError:
            raise
        except PregateError as error:
            return events + self._fail_step([p.sequence for p in step], error)
        self._count(step, result)
        self.scheduler.complete(step)
        for sequence, token in zip(result.sampled, result.tokens, strict=True):
            events += self._publish(sequence, token)
        running = [s for s in result.sampled if s.request_id in self._sequences]
        try:
            if self.paths is not None:
                with out_of_memory_fails():
                    self.paths.extend(running)
        except PregateError as error:
            events += self._fail_step(running, error)
        return events

    def _count(self, step: Many[Slice], result: StepResult) -> None:
        start = 0
        for piece in step:
            piece.sequence.pairs_per_host += result.pairs_TH[start : start + piece.num_tokens].sum(axis=0)
            start += piece.num_tokens

    def _fail_step(self, sequences: list[Sequence], error: PregateError) -> list[Event]:
        logger.error("step %d failed: %s", self._step_number, error)
        return self._fail(sequences, error)

    def _expire(self, now_s: float) -> list[Event]:
        late = [s for s in self._sequences.values() if s.deadline_s is not None and s.deadline_s <= now_s]
        for sequence in late:
            self._drop(sequence)
        return [_finished(s, "deadline") for s in late]

    def _publish(self, sequence: Sequence, token: int) -> list[Event]:
        """Append a sampled token; the end of a sequence frees what it holds."""
        sampling = sequence.sampling
        sequence.token_ids.append(token)
        stopped = token in sequence.stop_ids or (token in self.eos_ids and not sampling.ignore_eos)
        events: list[Event] = [] if stopped else [TokensEvent(sequence.request_id, (token,))]
        if stopped or sequence.num_generated >= sequence.max_tokens:
            self._drop(sequence)
            events.append(_finished(sequence, "stop" if stopped else "length"))
        return events


def _finished(sequence: Sequence, reason: str) -> FinishedEvent:
    per_host = tuple(int(n) for n in sequence.pairs_per_host)
    return FinishedEvent(sequence.request_id, reason, sequence.num_prompt, sequence.num_generated, per_host)

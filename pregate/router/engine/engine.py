"""The step loop: schedule, plan, run, sample, publish. One thread, no sockets, no asyncio.

Three parts that know nothing of each other: the scheduler decides which tokens run, `RunningPaths` knows where they go,
the model runner computes them. The engine passes on what one says to the next, and turns it into events.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from pregate.base.completion import TokenLogprob
from pregate.base.errors import HostLostError, PregateError, UserError
from pregate.base.log import get_logger
from pregate.base.memory import out_of_memory_fails
from pregate.model.folder import ModelFolder
from pregate.model.path_computer import PathComputer
from pregate.model.paths import Paths
from pregate.router.engine.admission import Admission
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.batching import PathBatcher
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.engine_info import describe
from pregate.router.engine.lookahead import Lookahead
from pregate.router.engine.options import EngineOptions
from pregate.router.engine.runner import ModelRunner, StepResult
from pregate.router.engine.running_paths import RunningPaths
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits, Slice
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_check import check_step
from pregate.router.engine.step_counts import StepCounts, with_pairs
from pregate.router.link.messages import FailedEvent, FinishedEvent, SubmitRequest, TokensEvent, check_prompt
from pregate.workers.client.host_client import HostClient

logger = get_logger(__name__)
Event = TokensEvent | FinishedEvent | FailedEvent
#: Logits of prompts in one step, where their logprobs are asked for: 64 MB of them.
_LOGITS_OF_PROMPTS = 1 << 24
#: Traced requests that hosts hear of in one step.
_MOST_TRACES = 64


class Engine:
    """Runs requests on a backbone whose experts live on hosts. See the module's docstring for a step."""

    def __init__(self, options: EngineOptions, folder: ModelFolder, backbone: Backbone, version: str) -> None:
        self.options, self.exchange, self.version = options, backbone.exchange, version
        self.config = backbone.config
        self.exact = self.config.routing == "path"
        self.context = self.config.context_tokens
        num_blocks = options.kv_blocks(self.context, backbone.kv_token_bytes, backbone.free_bytes)
        lane_blocks = max(1, num_blocks // options.max_running)
        with out_of_memory_fails(f"for a KV cache of {num_blocks * options.block_size} tokens (--kv-cache-memory)"):
            self.runner = ModelRunner(backbone, num_blocks, options.block_size, options.cuda_graphs)
        self.scheduler = Scheduler(
            SchedulerLimits(
                options.max_running,
                options.max_queued,
                options.step_tokens,
                options.max_queued_bytes,
                options.max_queued_tokens,
                max(1, _LOGITS_OF_PROMPTS // self.config.text_config.vocab_size),
                options.max_batching_delay,
            ),
            BlockAllocator(num_blocks, options.block_size, lane_blocks),
            options.prefix_sharing,
            "fifo" if options.batching == "path" else options.batching,
        )
        self.computer = computer = PathComputer(backbone.path_router) if backbone.path_router is not None else None
        foretold = self.exact or options.batching == "path" or self.exchange.wants_lookahead
        self.paths = RunningPaths(computer) if computer is not None and foretold else None
        self.lookahead = Lookahead(self.config.cuts, options.step_tokens) if self.paths is not None else None
        self.admission = Admission(
            self.config.text_config.vocab_size,
            self.context,
            num_blocks * options.block_size,
            folder.eos_ids,
            folder.repetition_penalty,
        )
        self.stop_strings = folder.stop_strings
        self._sequences: dict[str, Sequence] = {}
        self.counts = StepCounts(len(self.exchange.clients))
        self._foretold = False  # hosts expect something, as far as was said

    def batch_by_path(self, batcher: PathBatcher) -> None:
        """Choose steps by their paths from now on."""
        assert self.paths is not None, "without a path router there are no paths to choose by"
        self.scheduler.batcher = batcher

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def submit(self, request: SubmitRequest) -> None:
        """Accept a request; its whole prompt's paths are fixed here, before it is scheduled, unless it brings them.

        Raises UserError (bad prompt or sampling), QueueFullError, or PregateError where memory is lacking.
        """
        if request.request_id in self._sequences:
            raise UserError.of("request id", request.request_id, "is running already; use a new one")
        sequence = self.admission.sequence(request, len(self.exchange.clients))
        sequence.unit_counts = self.unit_counts()
        self.scheduler.check_room(sequence)
        if self.paths is not None:
            with out_of_memory_fails():
                self.paths.begin(sequence, request)
        try:
            self.scheduler.add(sequence, sequence.came_s)
        except PregateError:
            self._forget(sequence)
            raise
        self._sequences[request.request_id] = sequence
        self._look_ahead([])

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
        return describe(self)

    def idle(self) -> None:
        """Take in heartbeats while there is no work; HostLostError while no host answers.

        What hosts were told to expect of requests that ended before it was asked for, they are told once to forget.
        """
        if self._foretold and self.lookahead is not None and not self.has_work:
            self._foretold = False
            # Of the step after the next: so the last one that was planned is over, too (`NextUse.expect`).
            self.exchange.expect(self.lookahead.expect(self.counts.num_steps + 2, (), (), {}, forecast=False))
        self.exchange.poll()

    def replace_host(self, host: int, client: HostClient) -> None:
        """Let another process be a host from now on, or the next one."""
        self.exchange.replace(host, client)

    def place(self, copies_LRC: np.ndarray, num_hosts: int) -> None:
        """Let so many hosts serve these units from the next step on; those beyond are left."""
        self.exchange.place(copies_LRC, num_hosts)
        if (batcher := self.scheduler.batcher) is not None:
            self.scheduler.batcher, was_U = batcher.placed(copies_LRC[..., 0], num_hosts)
            for sequence in self._sequences.values():
                sequence.placed(was_U)

    def expire(self, error: PregateError | None = None) -> list[Event]:
        """End the requests whose deadline has passed: as such, or with an error that says why they had to wait."""
        now_s = time.monotonic()
        late = [s for s in self._sequences.values() if s.deadline_s is not None and s.deadline_s <= now_s]
        if error is not None:
            return self._fail(late, error)
        for sequence in late:
            self._drop(sequence)
        return [self._finished(s, "deadline") for s in late]

    def fail_all(self, error: PregateError) -> list[Event]:
        """End every request with `error`; the engine stays usable."""
        return self._fail(list(self._sequences.values()), error)

    def _fail(self, sequences: list[Sequence], error: PregateError) -> list[Event]:
        for sequence in sequences:
            self._drop(sequence)
        return [FailedEvent(s.request_id, error.code, str(error)) for s in sequences]

    def step(self) -> list[Event]:
        """Run one step; returns its events. A failure ends the requests in it and no others.

        Raises HostLostError while no host answers. Then nothing has happened, and the step can be tried again.
        """
        if late := self.expire():
            return late
        now_s = time.monotonic()
        step = self._next_step(now_s)
        if not step:
            return []
        if self.options.check_steps:
            check_step(step, self.scheduler)
        self.counts.num_steps += 1
        paths = None
        if self.paths is not None and self.exact:
            paths = self.paths.of_step([(p.sequence, p.num_tokens) for p in step])
        for piece in step:
            if piece.sequence.begun_s is None:
                piece.sequence.begun_s = now_s
        self._look_ahead(step)
        self.exchange.traces = " ".join([p.sequence.traceparent for p in step if p.sequence.traceparent][:_MOST_TRACES])
        try:
            result = self.runner.run(self.counts.num_steps, step, paths)
        except HostLostError:
            raise
        except PregateError as error:
            return self._fail_step([p.sequence for p in step], error)
        self._count(step, result, paths)
        rows_U = self._rows_of(step, paths)
        self.scheduler.complete(step)
        for sequence, logprob in result.prompt_logprobs:
            sequence.prompt_logprobs.append(logprob)
        events: list[Event] = []
        for sequence, token, logprob in zip(result.sampled, result.tokens, result.logprobs, strict=True):
            events += self._publish(sequence, token, logprob)
        running = [s for s in result.sampled if s.request_id in self._sequences]
        try:
            if self.paths is not None:
                with out_of_memory_fails():
                    self._foretell(running, self.paths.extend(running))
        except PregateError as error:
            events += self._fail_step(running, error)
        self._took(rows_U, len(result.pairs_TH), time.monotonic() - now_s)
        return events

    def _next_step(self, now_s: float) -> list[Slice]:
        if (batcher := self.scheduler.batcher) is not None:
            if self.exchange.wants_lookahead:
                self.exchange.poll()  # also hosts that the last step had nothing for
            batcher.hold(self.exchange.held_LR())
            self.scheduler.tries = self.exchange.wants_lookahead and not batcher.resident_U.all()
        return self.scheduler.next_step(now_s)

    def _look_ahead(self, step: Many[Slice]) -> None:
        """Say what comes after `step`, which runs next; where gates decide, also what it itself may need. Before there
        is one what is known has changed, and what is likely has not, or follows from it where steps are chosen."""
        if self.lookahead is None or not self.exchange.wants_lookahead:
            return
        scheduler, planned = self.scheduler, {piece.sequence: piece.num_tokens for piece in step}
        next_step, running, batcher = self.counts.num_steps + 1, scheduler.running, scheduler.batcher
        if batcher is not None and running and scheduler.choice is not None and scheduler.choice.chosen:
            expected = self.lookahead.demand(next_step, running, planned, batcher.layout)
        else:
            expected = self.lookahead.expect(next_step, running, scheduler.waiting, planned, forecast=bool(step))
        if step and not self.exact:
            expected = self.lookahead.before(expected, RunningPaths.of_step(list(planned.items())))
        self.exchange.expect(expected)
        self._foretold = True

    def _foretell(self, sequences: list[Sequence], paths: Paths) -> None:
        """Note what the next token of each sequence asks of the units."""
        batcher = self.scheduler.batcher
        if batcher is not None and sequences:
            for sequence, rows_U in zip(sequences, batcher.layout.rows_each(paths.ids), strict=True):
                sequence.next_rows_U = rows_U

    def _count(self, step: Many[Slice], result: StepResult, paths: Paths | None) -> None:
        self.counts.add(result.pairs_TH, paths)
        start = 0
        for piece in step:
            sequence, pairs_TH = piece.sequence, result.pairs_TH[start : start + piece.num_tokens]
            sequence.pairs_per_host = with_pairs(sequence.pairs_per_host, pairs_TH)
            start += piece.num_tokens

    def _rows_of(self, step: Many[Slice], paths: Paths | None) -> np.ndarray | None:
        """Rows that a step asks of each unit, uint16 [U], where steps are chosen by path."""
        if (batcher := self.scheduler.batcher) is None:
            return None
        paths = RunningPaths.of_step([(p.sequence, p.num_tokens) for p in step]) if paths is None else paths
        return batcher.layout.rows(paths.ids)

    def _took(self, rows_U: np.ndarray | None, num_tokens: int, took_s: float) -> None:
        self.counts.seconds_s += took_s
        if rows_U is not None and (batcher := self.scheduler.batcher) is not None:
            choice = self.scheduler.choice
            batcher.learn(rows_U, num_tokens, took_s, choice is not None and choice.chosen)

    def _fail_step(self, sequences: list[Sequence], error: PregateError) -> list[Event]:
        logger.error("step %d failed: %s", self.counts.num_steps, error)
        return self._fail(sequences, error)

    def _publish(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> list[Event]:
        """Append a sampled token; the end of a sequence frees what it holds."""
        first, stopped = sequence.num_generated == 0, token in sequence.end_ids
        sequence.token_ids.append(token)
        if first:
            sequence.first_token_s = time.monotonic()
        of_prompt = tuple(sequence.prompt_logprobs) if first else ()
        events: list[Event] = []
        if not stopped:
            logprobs = () if logprob is None else (logprob,)
            events.append(TokensEvent(sequence.request_id, (token,), logprobs, of_prompt))
        elif of_prompt:
            events.append(TokensEvent(sequence.request_id, (), (), of_prompt))
        if stopped or sequence.num_generated >= sequence.max_tokens:
            self._drop(sequence)
            events.append(self._finished(sequence, "stop" if stopped else "length"))
        return events

    def _finished(self, sequence: Sequence, reason: str) -> FinishedEvent:
        per_host = tuple(int(n) for n in sequence.pairs_per_host)
        hits, misses, stall_s = (
            max(0, now - then)  # a host that was replaced counts from the beginning
            for now, then in zip(self.unit_counts(), sequence.unit_counts, strict=True)
        )
        counts = sequence.num_prompt, sequence.num_generated, per_host
        ended_s = time.monotonic()
        begun_s = ended_s if sequence.begun_s is None else sequence.begun_s
        first_s = ended_s if sequence.first_token_s is None else sequence.first_token_s
        times = begun_s - sequence.came_s, first_s - begun_s, ended_s - first_s
        return FinishedEvent(sequence.request_id, reason, *counts, int(hits), int(misses), stall_s, *times)

    def unit_counts(self) -> tuple[int, int, float]:
        """Hits, misses and seconds waited for units of all hosts, as they last said."""
        counters = [client.cache for client in self.exchange.clients]
        return sum(c.hits for c in counters), sum(c.misses for c in counters), sum((c.stall_s for c in counters), 0.0)

"""Recordings of a checkpoint with exact paths: requests of given arrivals and texts through the engine's scheduler.

No model runs: a request's answer is the text that follows its prompt, whose paths the checkpoint's router says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pregate.base.errors import UserError
from pregate.cli.cache.recording import Recording
from pregate.cli.cache.requests import Request, make_requests, read_trace
from pregate.convert.text.documents import draw_documents, read_documents
from pregate.model.checkpoint import CheckpointReader
from pregate.model.folder import read_folder
from pregate.model.packed_paths import PackedPaths
from pregate.model.path_computer import PathComputer
from pregate.model.paths import Paths
from pregate.router.engine.blocks import BlockAllocator
from pregate.router.engine.lookahead import Lookahead, used_units
from pregate.router.engine.running_paths import RunningPaths
from pregate.router.engine.scheduler import Scheduler, SchedulerLimits
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams
from pregate.router.paths.load import load_router
from pregate.workers.link.expected import Expected

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Pace:
    """How long a step takes on the recording's clock, and what it may hold."""

    step_s: float = 0.02
    token_s: float = 0.0002
    step_tokens: int = 512
    max_running: int = 64


@dataclass
class _Run:
    """Requests on their way through a scheduler, and the steps recorded so far."""

    computer: PathComputer
    num_arrived: int = 0
    #: Of each request the paths of all its tokens and its answer.
    rest: dict[str, tuple[Paths, list[int]]] = field(default_factory=dict)
    used: list[np.ndarray] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def record(
    computer: PathComputer, requests: Iterable[Request], pace: Pace, unit_bytes: int, most_steps: int = 1 << 30
) -> Recording:
    """Run the requests and return up to `most_steps` steps of them; a unit has `unit_bytes`."""
    cuts = computer.cuts
    num_routed = max(cut.num_routed for cut in cuts)
    queue = deque(sorted(requests, key=lambda request: request.arrival_s))
    num_blocks = sum(-(-(len(r.prompt) + len(r.answer) + 1) // BLOCK_TOKENS) for r in queue)
    limits = SchedulerLimits(pace.max_running, len(queue) + 1, pace.step_tokens)
    scheduler = Scheduler(limits, BlockAllocator(num_blocks, BLOCK_TOKENS), prefix_sharing=False)
    ahead = Lookahead(cuts, pace.step_tokens)
    run, now_s = _Run(computer), 0.0
    while (queue or scheduler.waiting or scheduler.running) and len(run.used) < most_steps:
        if not scheduler.waiting and not scheduler.running:
            now_s = max(now_s, queue[0].arrival_s)
        while queue and queue[0].arrival_s <= now_s:
            scheduler.add(_arrive(run, queue.popleft()))
        step = scheduler.next_step()
        planned = {piece.sequence: piece.num_tokens for piece in step}
        run.used.append(used_units(RunningPaths.of_step(list(planned.items())).ids, num_routed))
        run.expected.append(ahead.expect(len(run.used), scheduler.running, scheduler.waiting, planned))
        run.tokens.append(sum(planned.values()))
        now_s += pace.step_s + pace.token_s * run.tokens[-1]
        scheduler.complete(step)
        for piece in step:
            if len(piece.sequence.token_ids) == piece.sequence.num_computed:
                _answer(run, scheduler, piece.sequence)
    known = np.stack([expected.known_HLR for expected in run.expected])
    likely = np.stack([expected.likely_LR for expected in run.expected])
    return Recording(np.stack(run.used), known, likely, np.array(run.tokens), np.array(unit_bytes))


def _arrive(run: _Run, request: Request) -> Sequence:
    name, num_prompt, most = str(run.num_arrived), len(request.prompt), len(request.answer)
    run.num_arrived += 1
    (paths,), _ = run.computer.extend([run.computer.new_state()], [request.prompt + request.answer])
    run.rest[name] = (paths, request.answer)
    sequence = Sequence(name, list(request.prompt), num_prompt, most, SamplingParams(most), 0, None, np.zeros(1))
    sequence.paths = PackedPaths.of(paths[slice(0, num_prompt)])
    return sequence


def _answer(run: _Run, scheduler: Scheduler, sequence: Sequence) -> None:
    """Append the next token of the answer and its path; the last one ends the request."""
    paths, answer = run.rest[sequence.request_id]
    num_known = len(sequence.token_ids)
    sequence.token_ids.append(answer[sequence.num_generated])
    assert sequence.paths is not None
    sequence.paths.append(paths[slice(num_known, num_known + 1)])
    if sequence.num_generated == len(answer):
        scheduler.remove(sequence)
        del run.rest[sequence.request_id]


def requests_of(
    model: Path, texts: Many[Path], trace: Path, num_requests: int, scale: float, seed: int
) -> tuple[PathComputer, int, list[Request]]:
    """Return a checkpoint's path computer, the bytes of its units, and requests made of a trace and of texts that all
    folders give equally often. UserError for a checkpoint whose paths are not exact."""
    folder, reader = read_folder(model), CheckpointReader(model)
    if reader.config.routing != "path":
        raise UserError.of("--model", model, "has gates in its layers; allowed: a checkpoint with exact paths")
    documents = draw_documents(read_documents(texts, folder.context_tokens, "--text"), seed)
    requests = make_requests(
        read_trace(trace, num_requests),
        [document.text for document in documents[:num_requests]],
        lambda text: list(folder.tokenizer(text)["input_ids"]),
        context=folder.context_tokens,
        scale=scale,
    )
    unit_bytes = max(reader.unit_bytes(layer) for layer in range(reader.num_layers))
    return PathComputer(load_router(reader)), unit_bytes, requests

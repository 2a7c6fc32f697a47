"""`ModelRunner`: the model of a step, on the device: KV cache, backbone, sampling. It decides nothing.

Data on its way: slices of sequences -> token ids, positions [T] and where their context lies -> logits [B, V] of the
rows that end a sequence -> one token each.

Shape letters: T tokens, B sequences that sample, V vocabulary, H hosts.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from pregate.base.completion import TokenLogprob
from pregate.base.memory import out_of_memory_fails
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.decode_graphs import decode_graphs
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.sampling import sample, token_logprobs
from pregate.router.engine.scheduler import Slice
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_layout import SequenceSlice, StepLayout


@dataclass(frozen=True)
class StepResult:
    """`tokens[b]`, from `logits_BV[b]`, is the next token of `sampled[b]`, and `logprobs[b]` what it asked about it;
    `prompt_logprobs` are of the next tokens of prompts, in order. `pairs_TH`: how many experts of a row each host
    served.
    """

    sampled: list[Sequence]
    logits_BV: torch.Tensor
    tokens: list[int]
    pairs_TH: np.ndarray
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: list[tuple[Sequence, TokenLogprob]]


class ModelRunner:
    """Runs steps on `backbone`, whose exchange it opens and closes. The cache is made here, at once."""

    def __init__(self, backbone: Backbone, num_blocks: int, block_size: int, graphs: bool = True) -> None:
        self.backbone = backbone
        with out_of_memory_fails():
            self.kv = PagedKV(num_blocks, block_size, backbone.kv_shapes, backbone.dtype, backbone.device)
        self.graphs = decode_graphs(backbone, self.kv) if graphs else None

    def run(self, number: int, step: Many[Slice], paths: Paths | None) -> StepResult:
        """Run a step, whose slices of one token come first. Raises HostLostError, or PregateError where memory lacks or
        a host failed."""
        ids = np.concatenate([p.sequence.token_ids[p.sequence.num_computed : p.stop] for p in step])
        positions = np.concatenate([np.arange(p.sequence.num_computed, p.stop) for p in step])
        ends = np.cumsum([p.num_tokens for p in step])
        wanted = [int(end) - 1 for p, end in zip(step, ends, strict=True) if p.samples]
        sampled = [p.sequence for p in step if p.samples]
        scored = [  # rows of prompts that foretell a token whose logprob is asked for and not known yet
            (p.sequence, position + 1, int(end) - p.stop + position)
            for p, end in zip(step, ends, strict=True)
            if p.sequence.sampling.prompt_logprobs is not None
            for position in range(
                max(p.sequence.num_computed, len(p.sequence.prompt_logprobs)), min(p.stop, p.sequence.num_prompt - 1)
            )
        ]
        slices = [SequenceSlice(p.sequence.table, p.sequence.num_computed, p.stop) for p in step]
        exchange = self.backbone.exchange
        with out_of_memory_fails():
            logits_BV = None
            if self.graphs is not None and paths is not None and len(ids) == len(wanted):
                logits_BV = self.graphs.run(slices, ids.astype(np.int64), positions, paths)
            if logits_BV is None:
                layout = StepLayout.build(self.kv, slices, self.backbone.device)
                exchange.begin_step(number, len(ids), paths)
                rows = [*wanted, *(row for *_, row in scored)]
                logits_BV = self.backbone.forward(ids.astype(np.int64), positions, layout, rows)
            logits_BV, of_prompts_BV = logits_BV[: len(wanted)], logits_BV[len(wanted) :]
            tokens = sample(logits_BV, sampled)
            asked = [b for b, s in enumerate(sampled) if s.sampling.logprobs is not None]
            known = token_logprobs(
                logits_BV[asked], [tokens[b] for b in asked], [sampled[b].sampling.logprobs or 0 for b in asked]
            )
            of_row = dict(zip(asked, known, strict=True))
            foretold = token_logprobs(
                of_prompts_BV,
                [s.token_ids[position] for s, position, _ in scored],
                [s.sampling.prompt_logprobs or 0 for s, *_ in scored],
            )
            return StepResult(
                sampled,
                logits_BV,
                tokens,
                exchange.end_step(),
                [of_row.get(b) for b in range(len(sampled))],
                [(s, logprob) for (s, *_), logprob in zip(scored, foretold, strict=True)],
            )

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

from pregate.base.memory import out_of_memory_fails
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.decode_graphs import decode_graphs
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.sampling import sample
from pregate.router.engine.scheduler import Slice
from pregate.router.engine.sequence import Sequence
from pregate.router.engine.step_layout import SequenceSlice, StepLayout


@dataclass(frozen=True)
class StepResult:
    """`tokens[b]`, from `logits_BV[b]`, is the next token of `sampled[b]`; `pairs_TH`: how many experts of a row each
    host served."""

    sampled: list[Sequence]
    logits_BV: torch.Tensor
    tokens: list[int]
    pairs_TH: np.ndarray


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
        slices = [SequenceSlice(p.sequence.table, p.sequence.num_computed, p.stop) for p in step]
        exchange = self.backbone.exchange
        with out_of_memory_fails():
            logits_BV = None
            if self.graphs is not None and paths is not None and len(ids) == len(wanted):
                logits_BV = self.graphs.run(slices, ids.astype(np.int64), positions, paths)
            if logits_BV is None:
                layout = StepLayout.build(self.kv, slices, self.backbone.device)
                exchange.begin_step(number, len(ids), paths)
                logits_BV = self.backbone.forward(ids.astype(np.int64), positions, layout, wanted)
            return StepResult(sampled, logits_BV, sample(logits_BV, sampled), exchange.end_step())

"""`Admission`: what a request is held to before the engine takes it, and the sequence it becomes."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

import numpy as np

from pregate.base.errors import UserError
from pregate.base.sampling import check_priority
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SubmitRequest, check_prompt


@dataclass(frozen=True)
class Admission:
    """The model's vocabulary and context, the tokens that the KV cache has room for, and what the model itself says of
    the end of a text and of repetition."""

    vocab_size: int
    context: int
    capacity: int
    eos_ids: frozenset[int]
    repetition_penalty: float

    def sequence(self, request: SubmitRequest, num_hosts: int) -> Sequence:
        """Return what a request becomes. UserError for a prompt or sampling that cannot be served."""
        sampling = request.sampling
        sampling.validate(self.vocab_size)
        check_priority(request.priority)
        check_prompt(request.token_ids, vocab_size=self.vocab_size, max_context=self.context)
        num_prompt = len(request.token_ids) - request.num_generated
        max_tokens = min(sampling.max_tokens, self.context - num_prompt)
        if not (num_prompt > 0 and 0 <= request.num_generated < max_tokens):
            raise UserError.of("num_generated", request.num_generated, f"must be below {max_tokens}, the max_tokens")
        if num_prompt + max_tokens > self.capacity:
            full = f"with this prompt exceeds the KV cache of {self.capacity} tokens"
            raise UserError.of("max_tokens", max_tokens, full)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(62)
        penalty = self.repetition_penalty if sampling.repetition_penalty is None else sampling.repetition_penalty
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids)
        if sampling.min_tokens > request.num_generated and len(ends) >= self.vocab_size:
            sentence = "with stop_token_ids of the whole vocabulary leaves no token; allowed: 0"
            raise UserError.of("min_tokens", sampling.min_tokens, sentence)
        now_s = time.monotonic()
        deadline_s = None if request.deadline_s is None else now_s + request.deadline_s
        hosts = np.zeros(num_hosts, dtype=np.int64)
        return Sequence(
            request.request_id, list(request.token_ids), num_prompt, max_tokens, sampling, seed, deadline_s, hosts,
            request.cache_salt, request.priority, ends, penalty, num_resumed=request.num_generated,
            came_s=now_s, traceparent=request.traceparent,
        )  # fmt: skip

"""Perplexity and bits per byte by one protocol: per document, BOS prepended, truncated to the context.

A document's first token (BOS, where the tokenizer has one) is given and not scored; perplexity is over all
scored tokens of all documents together. Documents of like length share a batch, padded on the right; that changes
nothing (a test holds it).

Shape letters: B documents of a batch, N tokens, n positions of a piece, V vocabulary, D hidden width, L layers, K
active experts, P positions of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pregate.convert.files.skeleton import with_forward
from pregate.convert.measure.agreement import AgreementMeter, MeteredPolicy
from pregate.convert.progress import QUIET, Advance, Progress
from pregate.convert.text.batches import batches, padded
from pregate.convert.text.calibration import encode_pool
from pregate.model.gated_mlp import decoder_layers
from pregate.model.layers import GatePolicy, PathPolicy, RoutingPolicy
from pregate.model.modeling import RoutedForCausalLM

#: Logits held at a time: 256 MiB of float32. (2,048 tokens of a vocabulary of 32,768 are still one piece.)
MOST_LOGITS = 1 << 26


def positions_at_once(num_rows: int, vocab_size: int) -> int:
    """How many positions of so many rows have at most `MOST_LOGITS` logits; 1 at least."""
    return max(1, MOST_LOGITS // (num_rows * vocab_size))


def logits_in_pieces(model: Any, ids_BN: torch.Tensor, mask_BN: torch.Tensor) -> Iterator[torch.Tensor]:
    """A dense or routed model's logits [B, n, V], piece by piece; the layers run once.

    The head is the model's own, with all it does to logits (a scale, a soft cap): its forward is called for each piece,
    what lies below the head giving the hidden states that are there already.
    """
    lm = getattr(model, "parent", model)
    size = positions_at_once(len(ids_BN), model.config.get_text_config().vocab_size)
    inputs = {"input_ids": ids_BN, "attention_mask": mask_BN, "use_cache": False}
    if ids_BN.shape[1] <= size:
        yield model(**inputs).logits
        return
    base, below, kept, kinds = lm.base_model, lm.base_model.forward, [], []

    def first(*args: Any, **kwargs: Any) -> Any:
        out = below(*args, **kwargs)
        kept.append(out.last_hidden_state)
        kinds.append(type(out))  # of a mixture of experts it has fields that its head asks for
        out.last_hidden_state = kept[0][:, :size]
        return out

    with with_forward(base, first):
        logits_BnV = model(**inputs).logits
    yield logits_BnV
    for hidden_BnD in kept[0][:, size:].split(size, dim=1):
        with with_forward(base, lambda *_args, **_kwargs: kinds[0](last_hidden_state=hidden_BnD)):  # noqa: B023
            logits_BnV = lm(inputs_embeds=hidden_BnD, use_cache=False).logits
        yield logits_BnV


#: Mean loss from which on a perplexity counts as infinite; exp overflows a little above.
MOST_NATS = 700


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood (natural log) of `num_tokens` scored tokens."""

    nats: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that is too large for a float, NaN where `nats` is."""
        nats = self.nats / self.num_tokens
        return math.inf if nats >= MOST_NATS else math.exp(nats)

    def bits_per_byte(self, num_bytes: int) -> float:
        return self.nats / math.log(2) / num_bytes

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.num_tokens + other.num_tokens)


def score_logits(logits_BNV: torch.Tensor, ids_BN: torch.Tensor, mask_BN: torch.Tensor) -> Score:
    """Negative log-likelihood of all ids but each row's first, in float32, summed in float64; `mask_BN` 0 at padding.

    Example: logits of 0 over a vocabulary of 4, three ids and no padding: 2 tokens, 2 ln 4 nats.
    """
    targets_BN = ids_BN[:, 1:].masked_fill(mask_BN[:, 1:] == 0, -100)
    logits_PV = logits_BNV[:, : targets_BN.shape[1]].float().flatten(0, 1)
    losses_P = F.cross_entropy(logits_PV, targets_BN.flatten(), reduction="none")
    return Score(losses_P.double().sum().item(), int(mask_BN[:, 1:].sum()))


def score_pieces(pieces: Iterable[torch.Tensor], ids_BN: torch.Tensor, mask_BN: torch.Tensor) -> Score:
    """As `score_logits`, of logits that come some positions at a time, [B, n, V] each."""
    score, at = Score(0.0, 0), 0
    for logits_BnV in pieces:
        here = slice(at, at + logits_BnV.shape[1] + 1)  # the id after a piece is its last position's target
        score += score_logits(logits_BnV, ids_BN[:, here], mask_BN[:, here])
        at += logits_BnV.shape[1]
    return score


@torch.no_grad()
def score_rows(
    model: Any,
    rows: Sequence[list[int]],
    meter: AgreementMeter | None = None,
    progress: Progress = QUIET,
    control: RoutingPolicy | None = None,
    name: str = "",
) -> Score:
    """Score rows of token ids (each of 2 or more); with `meter`, collect the routers' agreement on the way.

    `control` takes the routing over from what the checkpoint says; `name` is whose scores they are, for `progress`,
    which counts tokens: a long document advances it layer by layer.
    """
    score, total = Score(0.0, 0), sum(map(len, rows))
    with progress.stage(f"scoring {name}".rstrip(), total) as advance:
        for batch in batches(rows):
            ids_BN, mask_BN = (t.to(model.device) for t in padded([rows[i] for i in batch]))
            policy = control if meter is None else _metered(model, ids_BN, mask_BN, meter, control)
            with routed_by(model, policy), _by_layer(model, sum(len(rows[i]) for i in batch), advance):
                score += score_pieces(logits_in_pieces(model, ids_BN, mask_BN), ids_BN, mask_BN)
    return score


@contextmanager
def _by_layer(model: Any, num_tokens: int, advance: Advance) -> Iterator[None]:
    """Within the block, in which the model runs `num_tokens` once, every layer that is done advances its share."""
    layers = decoder_layers(model)
    done = [num_tokens * n // len(layers) for n in range(len(layers) + 1)]

    def hook(index: int) -> Any:
        def call(*_args: Any) -> None:  # what a hook returns would be the layer's output
            advance(done[index + 1] - done[index])

        return call

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def routed_by(model: Any, policy: RoutingPolicy | None) -> Iterator[None]:
    """Let `policy` choose the experts of a routed `model` within the block; with None nothing changes."""
    if policy is None:
        yield
        return
    before, model.routing_policy = model.routing_policy, policy
    try:
        yield
    finally:
        model.routing_policy = before


def _metered(
    model: RoutedForCausalLM,
    ids_BN: torch.Tensor,
    mask_BN: torch.Tensor,
    meter: AgreementMeter,
    control: RoutingPolicy | None,
) -> MeteredPolicy:
    """The routing in use (`control`, else the checkpoint's own), watched by `meter`."""
    real_T, by_path = mask_BN.flatten().bool(), None
    if model.path_router is not None:
        states = [model.path_computer.new_state() for _ in ids_BN]
        by_path = PathPolicy.of(model.batch_paths(ids_BN, mask_BN, states)[0])
    paths_TLK = None if by_path is None else by_path.ids_TLK
    if control is not None:
        return MeteredPolicy(control, meter, real_T, paths_TLK, control_name="control")
    own: RoutingPolicy = by_path if by_path is not None and model.config.routing == "path" else GatePolicy()
    return MeteredPolicy(own, meter, real_T, paths_TLK)


def encode_all(
    tokenizer: Any, texts: Sequence[str], context: int, max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Rows of ids until `max_tokens` scored tokens are reached, and how many bytes of text are scored."""
    total = math.inf if max_tokens is None else max_tokens
    rows = list(encode_pool(texts, tokenizer, context, total, num_given=1))
    return rows, sum(len(tokenizer.decode(ids[1:]).encode()) for ids in rows)

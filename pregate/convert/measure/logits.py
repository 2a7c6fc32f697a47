"""Logits some positions at a time, so that memory is bounded whatever the document and the vocabulary.

Shape letters: B documents of a batch, N tokens, n positions of a piece, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from pregate.convert.files.skeleton import with_forward

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
    base, below, kept = lm.base_model, lm.base_model.forward, []

    def first(*args: Any, **kwargs: Any) -> Any:
        out = below(*args, **kwargs)
        kept.append(out.last_hidden_state)
        out.last_hidden_state = kept[0][:, :size]
        return out

    with with_forward(base, first):
        logits_BnV = model(**inputs).logits
    yield logits_BnV
    for hidden_BnD in kept[0][:, size:].split(size, dim=1):
        with with_forward(base, lambda *_args, **_kwargs: BaseModelOutputWithPast(last_hidden_state=hidden_BnD)):  # noqa: B023
            logits_BnV = lm(inputs_embeds=hidden_BnD, use_cache=False).logits
        yield logits_BnV

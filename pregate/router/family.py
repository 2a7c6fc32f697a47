"""Is a model family served correctly? A tiny random model of it, run past its window, must match its own attention.

So a family whose attention we do not know is refused by name before anything starts, not served wrongly.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pregate.base.errors import UserError
from pregate.router.attention import ATTENTION_NAME, StepLayout, register_attention
from pregate.router.kv_cache import PagedKV

_NUM_TOKENS = 24
_WINDOW = 8
_TOLERANCE = 1e-4


def tiny_config(config: PretrainedConfig, window: int = _WINDOW) -> PretrainedConfig:
    """Return a copy of `config` with the same architecture switches at toy size, sliding window included."""
    tiny = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "query_pre_attn_scalar": 8,
        "max_window_layers": 0,
    }
    for name, value in sizes.items():
        if hasattr(tiny, name):
            setattr(tiny, name, value)
    if layer_types:
        # One layer of each kind the model mixes, at least two layers in all.
        kinds = list(dict.fromkeys(layer_types))
        tiny.layer_types = kinds if len(kinds) > 1 else kinds * 2
        tiny.num_hidden_layers = len(tiny.layer_types)
    if getattr(tiny, "sliding_window", None):
        tiny.sliding_window = window
    return tiny


def check_family(config: PretrainedConfig) -> None:
    """Raise UserError naming the family unless our paged attention matches its own eager attention.

    `config` is the parent's config; nothing of its weights is read.
    """
    family = config.model_type
    try:
        difference = _difference(config)
    except UserError as error:
        raise UserError(f"model family {family!r} cannot be served: {error}") from error
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError, IndexError) as error:
        # Any way a foreign architecture fails under our attention means the same: it cannot be served.
        raise UserError(
            f"model family {family!r} cannot be served: its attention failed the check ({error})"
        ) from error
    if not difference <= _TOLERANCE:
        raise UserError(
            f"model family {family!r} cannot be served: under pregate's attention a tiny model of it differs from its"
            f" own by {difference:.1e} (allowed: {_TOLERANCE:.0e})"
        )


@torch.inference_mode()
def _difference(config: PretrainedConfig) -> float:
    """Largest logit difference over a prompt in two chunks and decode steps, beside the whole text at once."""
    register_attention()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(config), dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model.eval()
    ids = torch.arange(1, _NUM_TOKENS + 1)[None] % 61
    whole = model(input_ids=ids, use_cache=False).logits[0]
    if not _reads_the_past(model, ids, whole):
        raise UserError("its logits do not depend on earlier tokens in the check")
    model.set_attn_implementation(ATTENTION_NAME)
    kv = PagedKV(_NUM_TOKENS)
    parts = []
    for start, stop in [(0, 6), (6, 20), *((n, n + 1) for n in range(20, _NUM_TOKENS))]:
        slots = np.arange(stop, dtype=np.int64)
        one = stop == start + 1
        layout = StepLayout.build(kv, [slots] if one else [], [] if one else [(stop - start, slots)])
        positions = torch.arange(start, stop)[None]
        parts.append(
            model(input_ids=ids[:, start:stop], position_ids=positions, use_cache=False, pregate_step=layout).logits[0]
        )
    return (torch.cat(parts) - whole).abs().max().item()


def _reads_the_past(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> bool:
    """True when changing an early token moves later logits: else the comparison would show nothing."""
    changed = ids.clone()
    changed[0, _NUM_TOKENS - 4] = 63
    later = model(input_ids=changed, use_cache=False).logits[0]
    return not torch.allclose(later[-1], whole[-1], atol=1e-3)

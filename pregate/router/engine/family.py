"""Is a model family served correctly? A tiny random model of it, run past its window, must match its own attention.

So a family whose attention we do not know is refused by name before anything starts, not served wrongly.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PretrainedConfig

from pregate.base.errors import UserError
from pregate.base.log import get_logger
from pregate.model.config import rope_sets
from pregate.router.engine.attention import ATTENTION_NAME, register_attention, run_step
from pregate.router.engine.decoder_parts import NotLeanError, lean_decoder
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.probe import probe
from pregate.router.engine.step_layout import SequenceSlice, StepLayout

logger = get_logger(__name__)
_WINDOW = 8
_CONTEXT = 64
_TOLERANCE = 1e-4
#: The check's two texts: their lengths, and the blocks each has in the cache, some beside each other.
_LENGTHS, _BLOCK, _NUM_BLOCKS = (24, 18), 4, 12
_TABLES = ((0, 1, 2, 3, 4, 5), (6, 7, 8, 10, 9))
#: Its steps, in row order: (text, start, stop). A text alone, two together, decode tokens beside a chunk and alone.
_STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, 0, 6),),
    ((0, 6, 20), (1, 0, 9)),
    ((0, 20, 21), (1, 9, 16)),
    ((0, 21, 22), (1, 16, 17)),
    ((0, 22, 23), (1, 17, 18)),
    ((0, 23, 24),),
)
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": _CONTEXT,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "max_window_layers": 0,
}
#: What families call the reach of their local layers.
_WINDOW_NAME = re.compile(r"^(sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size)$")
#: Any way a foreign architecture fails under our attention means the same: it cannot be served.
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    IndexError,
    StrictDataclassError,
)


Run = Callable[[torch.Tensor, torch.Tensor, StepLayout, torch.Tensor], torch.Tensor]


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of `config` with the same architecture switches at toy size, sliding window included.

    It has one layer of each kind that the model mixes, and at least two.
    """
    tiny = copy.deepcopy(config)
    _keep_one_layer_of_a_kind(tiny)
    for name, value in _SIZES.items():
        if hasattr(tiny, name) and name != "num_hidden_layers":
            setattr(tiny, name, value)
    if groups := getattr(config, "num_key_value_heads", None):
        tiny.num_key_value_heads = {1: 1, config.num_attention_heads: 4}.get(groups, 2)  # one, all or some, as before
    for name in filter(_WINDOW_NAME.match, list(vars(tiny))):
        if isinstance(getattr(tiny, name), int):
            setattr(tiny, name, _WINDOW)
    _shrink_rope(tiny, getattr(config, "max_position_embeddings", _CONTEXT))
    return tiny


def _keep_one_layer_of_a_kind(tiny: Any) -> None:
    """Cut every list with an entry per layer to the first layers that differ in any of them."""
    num_layers = getattr(tiny, "num_hidden_layers", 0)
    lists = {n: v for n, v in vars(tiny).items() if isinstance(v, list) and v and len(v) == num_layers}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True))) if lists else []
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    tiny.num_hidden_layers = len(kinds) or _SIZES["num_hidden_layers"]
    for name, column in zip(lists, zip(*kinds, strict=True), strict=True):
        setattr(tiny, name, list(column))


def _shrink_rope(tiny: Any, context: int) -> None:
    """Fit rotary settings to the toy head: factors one per pair of channels, and the stretch kept as it was."""
    for rope in rope_sets(tiny):
        pairs = int(_SIZES["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if name in rope:
                rope[name] = rope[name][:pairs]
        if original := rope.get("original_max_position_embeddings"):
            tiny.max_position_embeddings = max(_CONTEXT, _CONTEXT * context // original)
            rope["original_max_position_embeddings"] = _CONTEXT
            if hasattr(tiny, "original_max_position_embeddings"):
                tiny.original_max_position_embeddings = _CONTEXT


def check_family(config: PretrainedConfig) -> bool:
    """Raise UserError naming the family unless a tiny model of it under our paged attention matches its own; return
    whether it does as a lean decoder, too.

    `config` is the parent's config; nothing of its weights is read.
    """
    family = config.model_type
    try:
        texts = [(torch.arange(length) * (7 + length) + 1) % 61 for length in _LENGTHS]
        difference, expected = _difference(config, texts)
    except UserError as error:
        raise UserError(f"model family {family!r} cannot be served: {error}") from error
    except _FAILURES as error:
        raise UserError(
            f"model family {family!r} cannot be served: its attention failed the check ({error})"
        ) from error
    if not difference <= _TOLERANCE:
        raise UserError(
            f"model family {family!r} cannot be served: under pregate's attention a tiny model of it differs from its"
            f" own by {difference:.1e} (allowed: {_TOLERANCE:.0e})"
        )
    reason = _why_not_lean(config, texts, expected)
    logger.info("family %s: %s", family, reason or "runs as a lean decoder")
    return not reason


@torch.inference_mode()
def _difference(config: PretrainedConfig, texts: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Largest logit difference of two texts, run together in chunks and decode steps, beside each at once, whose logits
    [N, V] are returned as well."""
    register_attention()
    model = _tiny_model(config)
    whole = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in texts]
    if not _reads_the_past(model, texts[0], whole[0]):
        raise UserError("its logits do not depend on earlier tokens in the check")
    shapes = probe(model).kv_shapes
    model.set_attn_implementation(ATTENTION_NAME)

    return _compare(partial(run_step, model), PagedKV(_NUM_BLOCKS, _BLOCK, shapes), texts, whole), whole


@torch.inference_mode()
def _why_not_lean(config: PretrainedConfig, texts: list[torch.Tensor], whole: list[torch.Tensor]) -> str:
    """Why the family runs as transformers has it and not as a lean decoder; empty if it runs lean."""
    model = _tiny_model(config)
    seen = probe(model)
    try:
        decoder = lean_decoder(model, seen)
        difference = _compare(decoder.forward, PagedKV(_NUM_BLOCKS, _BLOCK, seen.kv_shapes), texts, whole)
    except (NotLeanError, *_FAILURES) as error:
        return f"runs in transformers' modules: it has {error}"
    if difference <= _TOLERANCE:
        return ""
    return f"runs in transformers' modules: as a lean decoder it would differ by {difference:.1e}"


def _tiny_model(config: PretrainedConfig) -> Any:
    """A random model of the family at toy size, with weights large enough that every part shows in the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(config), dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        generator = torch.Generator().manual_seed(parameter.numel())
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.3, generator=generator)
        else:  # a norm's weight or a bias, which at its first value would hide where it is left out
            parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _compare(run: Run, kv: PagedKV, texts: list[torch.Tensor], whole: list[torch.Tensor]) -> float:
    """Run the check's steps as the backbone does; rows are asked for last row first."""
    difference = 0.0
    for step in _STEPS:
        layout = StepLayout.build(kv, [SequenceSlice(_TABLES[text], start, stop) for text, start, stop in step])
        ids_T = torch.cat([texts[text][start:stop] for text, start, stop in step])
        positions_T = torch.cat([torch.arange(start, stop) for _, start, stop in step])
        logits = run(ids_T, positions_T, layout, torch.arange(len(ids_T)).flip(0)).flip(0)
        expected = torch.cat([whole[text][start:stop] for text, start, stop in step])
        found = (logits - expected).abs().max().item()
        difference = max(difference, math.inf if math.isnan(found) else found)
    return difference


def _reads_the_past(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> bool:
    """True when changing an early token moves later logits: else the comparison would show nothing."""
    changed = ids.clone()
    changed[-4] = 63
    later = model(input_ids=changed[None], use_cache=False).logits[0]
    return not torch.allclose(later[-1], whole[-1], atol=1e-3)

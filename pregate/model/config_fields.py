"""What of a config.json is the model: keys of somebody's machine are left out by name, wrong values refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

#: How somebody's machine ran: attention, outputs, placement, remote code. None of it changes what the model computes.
MACHINE_KEYS = frozenset(
    """
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset attn_impl
    _flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 experts_implementation
    _experts_implementation _experts_implementation_internal return_dict use_return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores output_logits torchscript use_cache device device_map
    max_memory offload_folder low_cpu_mem_usage gradient_checkpointing use_bfloat16 torch_compile compile_config
    chunk_size_feed_forward pruned_heads tp_plan pp_plan distributed_config parallelism_config use_kernels auto_map
    _commit_hash _name_or_path trust_remote_code unsloth_version unsloth_fixed id2label label2id num_labels
    problem_type finetuning_task task_specific_params
    """.split()  # noqa: SIM905
)
#: Notes of quantisation. Over plain weights they are left over, and transformers drops them too when it dequantises.
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
#: What picks tokens: keys of generation configs, which older models have in config.json.
GENERATION_KEYS = frozenset(
    """
    stop_strings max_length max_new_tokens min_length min_new_tokens max_time early_stopping num_beams num_beam_groups
    num_return_sequences penalty_alpha min_p top_h typical_p epsilon_cutoff eta_cutoff diversity_penalty
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids force_words_ids constraints renormalize_logits forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    token_healing guidance_scale watermarking_config prompt_lookup_num_tokens dola_layers decoder_start_token_id
    cache_implementation do_sample temperature top_k top_p
    """.split()  # noqa: SIM905
)
#: Those that a generation_config.json is obeyed in, beside its eos_token_id.
OBEYED_KEYS = ("repetition_penalty", "stop_strings")
#: Values of these that change nothing, for numbers and switches; 1 counts for factors, 0 for sizes and false.
_NO_CHANGE: tuple[Any, ...] = (None, False, 0, 1)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NO_SIZE = ("num_key_value_heads", "head_dim")
_PER_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "initializer_range")
_NAMES = ("hidden_act", "hidden_activation")
_MAPPINGS = ("rope_scaling", "rope_parameters")
DTYPES = ("float32", "float16", "bfloat16", "float64")


def clean_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that say what the model is; those of a text model within it likewise.

    A padding id that is no row of the embedding is set to null: nothing here pads by it.
    """
    dropped = {*MACHINE_KEYS, *QUANTISATION_KEYS, *GENERATION_KEYS}
    kept = {key: value for key, value in fields.items() if key not in dropped}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = clean_fields(kept["text_config"])
    pad, size = kept.get("pad_token_id"), kept.get("vocab_size")
    if _is_int(pad) and _is_int(size) and not 0 <= pad < size:
        kept["pad_token_id"] = None
    return kept


def without_outside_pad(config: Any) -> Any:
    """`config`, of transformers, less a padding id outside its vocabulary: a default of its family, say."""
    pad = getattr(config, "pad_token_id", None)
    if _is_int(pad) and not 0 <= pad < config.vocab_size:
        config.pad_token_id = None
    return config


def wrong_value(fields: Mapping[str, Any]) -> str:
    """The first value that no model has, as "key is value; allowed: ..."; empty where there is none.

    Example: {"num_hidden_layers": "six"} gives 'num_hidden_layers is "six"; allowed: a whole number from 1'.
    """
    for key, value in fields.items():
        if allowed := _allowed(key, value):
            return f"{key} is {_shown(value)}; allowed: {allowed}"
    return ""


def _allowed(key: str, value: Any) -> str:  # noqa: PLR0911 (a table in code)
    """What `key` may be, where `value` is not it; else empty."""
    if key in (*_SIZES, *_NO_SIZE, "max_position_embeddings"):
        values: list[Any] = value if isinstance(value, list) and value and key in _PER_LAYER else [value]
        good = all(_is_int(v) and v > 0 for v in values) or (key in _NO_SIZE and value is None)
        return "" if good else "a whole number from 1" + (" or null" if key in _NO_SIZE else "")
    if key in _SWITCHES and not isinstance(value, bool):
        return "true or false"
    if key in _NUMBERS and value is not None and (isinstance(value, bool) or not isinstance(value, int | float | dict)):
        return "a number"
    if key in _NAMES and value is not None and not isinstance(value, str):
        return "the name of an activation"
    if key in _MAPPINGS and value is not None and not isinstance(value, dict):
        return "an object or null"
    if key == "sliding_window" and value is not None and not (_is_int(value) and value >= 0):
        return "a whole number from 0 or null"
    if key == "layer_types" and value is not None and not isinstance(value, list):
        return "a list of names or null"
    if key in ("dtype", "torch_dtype") and value is not None and str(value).removeprefix("torch.") not in DTYPES:
        return f"{', '.join(DTYPES)}"
    if key in ("bos_token_id", "pad_token_id") and value is not None and not _is_int(value):
        return "a token id or null" if key == "pad_token_id" or not _are_ids(value) else ""
    if key == "eos_token_id" and value is not None and not _are_ids(value):
        return "a token id, a list of them, or null"
    if key == "repetition_penalty" and value is not None:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
        return "" if 0 < number < float("inf") else "a number above 0 or null"
    if key == "stop_strings" and value is not None:
        texts = value if isinstance(value, list) else [value]
        return "" if all(isinstance(t, str) and t for t in texts) else "a text, a list of them, or null"
    return ""


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids of a field that holds one, several or none."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def ignored_settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What `generation` (of generation_config.json) asks for that would change text, and is obeyed by nobody here."""
    return {k: v for k, v in generation.items() if k in GENERATION_KEYS and (v is True or v not in _NO_CHANGE)}


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    return all(map(_is_int, value)) if isinstance(value, list) else _is_int(value)


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    text = f'"{value}"' if isinstance(value, str) else text
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Loading the dense model a conversion starts from; its folder was read and checked before (`model/folder.py`)."""

from __future__ import annotations

from typing import Any, get_args

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN

from pregate.base.options import Dtype
from pregate.convert.files.shards import DenseShards
from pregate.convert.files.work_folder import short_digest
from pregate.convert.progress import Progress
from pregate.model.config_fields import without_outside_pad
from pregate.model.file_hashes import file_sha256
from pregate.model.folder import ModelFolder
from pregate.model.shard_file import INDEX
from pregate.model.tokenizer import reading_difference

#: Weights below this are hashed for the manifest; a disk takes minutes over those of a large model.
HASHED_BYTES = 2 << 30


def dense_config(folder: ModelFolder) -> Any:
    """Config of a dense model; UserError for a checkpoint that is converted already, or what no model is built of."""
    if folder.is_routed:
        raise folder.refuse("is a pregate checkpoint already; allowed: a dense model")
    model_type = folder.fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise folder.refuse(f"transformers cannot read its config (it does not know model_type {model_type!r})")
    try:
        fields = PretrainedConfig._decode_special_floats(dict(folder.fields))
        config: Any = CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # its families raise many kinds for values they cannot use
        raise folder.refuse(f"transformers cannot read its config ({in_one_line(error)})") from error
    for key in ("hidden_activation", "hidden_act"):
        act = getattr(config, key, None)
        if act is not None and act not in ACT2FN:
            known = ", ".join(name for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu2") if name in ACT2FN)
            raise folder.refuse(f"its config.json's {key} is {act!r}; allowed: an activation of transformers ({known})")
    heads, key_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    for whole, parts, what in (
        (None if getattr(config, "head_dim", None) else getattr(config, "hidden_size", None), heads, "hidden_size"),
        (heads, key_heads, "num_attention_heads"),
    ):
        if isinstance(whole, int) and isinstance(parts, int) and whole % parts:
            divisor = "num_attention_heads" if what == "hidden_size" else "num_key_value_heads"
            raise folder.refuse(f"its config.json's {what} is {whole}; allowed: a multiple of {divisor}, {parts}")
    return without_outside_pad(config)


def load_dense(folder: ModelFolder) -> Any:
    """Load the dense model in float32; UserError when its weights are missing, damaged or not finite."""
    config = dense_config(folder)
    generation = GenerationConfig(eos_token_id=sorted(folder.eos_ids) or None)
    settings = {"dtype": torch.float32, "generation_config": generation, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder.path, config=config, **settings)
    except Exception as error:  # of a folder's files, whatever they hold: many kinds
        raise folder.refuse(f"its weights cannot be loaded ({in_one_line(error)})") from error
    model, info = loaded
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:  # transformers only warns, and goes on with random weights in their place
        raise folder.refuse(f"its weights lack {absent[0]} ({len(absent)} tensors in all)")
    check_finite(dict(model.named_parameters()), folder)
    return model.eval()


def check_finite(tensors: dict[str, torch.Tensor], folder: ModelFolder) -> None:
    """UserError naming the first tensor that holds NaN or an infinity: nothing can be measured with it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise folder.refuse(f"its weights are damaged: {name} holds NaN or infinite values")


def tell_differences(folder: ModelFolder, progress: Progress) -> None:
    """Say what of the parent's folder is not followed, and where others would read its tokenizer otherwise."""
    for note in (*folder.notes, reading_difference(folder.path, folder.tokenizer)):
        if note:
            progress.note(f"{folder.path}: {note}")


def stored_dtype(folder: ModelFolder) -> Dtype:
    """What most of the model's weights are stored as; float32 where that is a type we do not write."""
    commonest = DenseShards(folder.path, folder.option).dtypes[:1]
    return next((dtype for dtype in get_args(Dtype) if [dtype] == commonest), "float32")


def source_of(folder: ModelFolder) -> dict[str, Any]:
    """What the manifest keeps of the parent: absolute path, type, and the sha256 of its config, index and shards.

    Shards of `HASHED_BYTES` and more together are not hashed; `hashed` says which it was. `dtypes`: what its weights
    are stored as, the commonest first, `dtype_exceptions` those not of the commonest, by name (the conversion may
    store them otherwise, and `pregate export --format dense` gives them back).
    """
    path, shards = folder.path, DenseShards(folder.path, folder.option)
    files, hashed = [p for p in (path / "config.json", path / INDEX) if p.is_file()], "config, index and shards"
    if sum(shard.stat().st_size for shard in shards.files) < HASHED_BYTES:
        files += shards.files
    else:
        hashed = f"config and index alone (the shards are {HASHED_BYTES} bytes or more)"
    source = {"path": str(path.resolve()), "model_type": folder.fields["model_type"], "hashed": hashed}
    source["sha256"] = {p.name: file_sha256(p) for p in files}
    return source | {"dtypes": shards.dtypes, "dtype_exceptions": shards.dtype_exceptions}


def shards_stamp(folder: ModelFolder) -> str:
    """A digest of which files the weights are and when they were written: resolved path, size and mtime of each.

    It costs the same at any size, and tells two models of one architecture and index apart.
    """
    files = [file.resolve() for file in DenseShards(folder.path, folder.option).files]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return short_digest(stamps)


def source_fields(folder: ModelFolder, source: dict[str, Any]) -> dict[str, Any]:
    """What tells the dense model in `folder` apart, as fields of a fingerprint; `source` is its `source_of`.

    A large model's shards are not hashed, so its path and its shards' stamp stand for them.
    """
    fields = {"--model": source["path"], "the model's shards": shards_stamp(folder)}
    return fields | {f"source {name}": digest[:16] for name, digest in source["sha256"].items()}


def in_one_line(error: Exception) -> str:
    """What an error of a library says, its lines joined; only the first where more is advice."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [repr(error)]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]

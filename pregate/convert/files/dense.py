"""The dense model: loading the one a conversion starts from, whose folder was read and checked before
(`model/folder.py`), and finding the one a routed checkpoint is compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN

from pregate.base.errors import UserError, in_one_line
from pregate.convert.files.shards import DenseShards
from pregate.convert.progress import QUIET, Progress
from pregate.model.checkpoint import read_manifest
from pregate.model.config_fields import without_outside_pad
from pregate.model.file_hashes import file_sha256
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.shard_file import INDEX
from pregate.model.tokenizer import reading_difference

#: Weights below this are hashed for the manifest; a disk takes minutes over those of a large model.
HASHED_BYTES = 2 << 30


def dense_config(folder: ModelFolder) -> Any:
    """Config of a dense model; UserError for a checkpoint that is converted already, or what no model is built of."""
    folder.check("dense")
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
            known = "an activation of transformers (silu, gelu, gelu_pytorch_tanh, relu2)"
            raise folder.refuse(f"its config.json's {key} is {act!r}; allowed: {known}")
    multiples = [("num_attention_heads", "num_key_value_heads")]
    multiples += [] if getattr(config, "head_dim", None) else [("hidden_size", "num_attention_heads")]
    for key, divisor in multiples:
        whole, parts = getattr(config, key, None), getattr(config, divisor, None)
        if isinstance(whole, int) and isinstance(parts, int) and whole % parts:
            raise folder.refuse(f"its config.json's {key} is {whole}; allowed: a multiple of {divisor}, {parts}")
    return without_outside_pad(config)


def dense_folder(path: Path, option: str) -> ModelFolder:
    """The folder of a dense model; UserError as of `dense_config`."""
    folder = read_folder(path, option)
    dense_config(folder)
    return folder


def load_dense(folder: ModelFolder, progress: Progress = QUIET) -> Any:
    """Load the dense model in float32; UserError when its weights are missing, damaged or not finite."""
    config = dense_config(folder)
    generation = GenerationConfig(eos_token_id=sorted(folder.eos_ids) or None)
    settings = {"dtype": torch.float32, "generation_config": generation, "output_loading_info": True}
    try:
        with progress.doing(f"loading {folder.path.name}"):
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


def source_of(folder: ModelFolder, shards: DenseShards) -> dict[str, Any]:
    """What the manifest keeps of the parent: absolute path, type, and the sha256 of its config, index and shards.

    Shards of `HASHED_BYTES` and more together are not hashed; `hashed` says which it was. `dtypes`: what its weights
    are stored as, the commonest first, `dtype_exceptions` those not of the commonest, by name (the conversion may
    store them otherwise, and `pregate export --format dense` gives them back).
    """
    path, dtypes = folder.path, shards.dtypes
    files, hashed = [p for p in (path / "config.json", path / INDEX) if p.is_file()], "config, index and shards"
    if sum(shard.stat().st_size for shard in shards.files) < HASHED_BYTES:
        files += shards.files
    else:
        hashed = f"config and index alone (the shards are {HASHED_BYTES} bytes or more)"
    return {
        "path": str(path.resolve()),
        "model_type": folder.fields["model_type"],
        "hashed": hashed,
        "sha256": {p.name: file_sha256(p) for p in files},
        "dtypes": dtypes,
        "dtype_exceptions": {name: dtype for name, dtype in shards.weight_types.items() if [dtype] != dtypes[:1]},
    }


def source_fields(source: dict[str, Any], shards: DenseShards) -> dict[str, Any]:
    """What tells a dense model apart, as fields of a fingerprint; `source` is its `source_of`.

    A large model's shards are not hashed, so its path and its shards' stamp stand for them.
    """
    fields = {"--model": source["path"], "the model's shards": shards.stamp}
    return fields | {f"source {name}": digest[:16] for name, digest in source["sha256"].items()}


def recorded_parent(path: Path) -> Path | None:
    """The dense model that the manifest of the checkpoint at `path` names; None where it is not found unchanged.

    It is looked for where it was (a relative path: from the working directory), then beside the checkpoint under its
    name, as folders that were moved together lie. All files that the manifest has a sha256 of must have it still; the
    weights of a large parent are not among them (`dense.HASHED_BYTES`), and other weights in their place go unseen.
    """
    source = read_manifest(path).source
    was, hashes = Path(str(source.get("path", ""))), source.get("sha256", {})
    for place in (was, path.resolve().parent / was.name):
        files = {place / name: digest for name, digest in hashes.items()}
        if files and all(f.is_file() for f in files) and all(file_sha256(f) == digest for f, digest in files.items()):
            return place
    return None


def dense_of(path: Path, model: RoutedForCausalLM, given: Path | None) -> Path | None:
    """The dense model to compare the checkpoint at `path`, loaded as `model`, with; None: itself with every expert on.

    That is `given`, else the recorded parent, else itself where that is the same, all but the rounding of a smaller
    type; so a checkpoint is its own last of all. UserError naming --parent where there is none of these.
    """
    found, manifest = given or recorded_parent(path), read_manifest(path)
    cut = next((f"layer {mlp.layer}'s" for mlp in model.routed_mlps if not mlp.is_partition), "")
    if found or not (manifest.is_tuned or cut):
        return found
    why = "was tuned, so with every expert on it is its dense parent no more"
    if not manifest.is_tuned:
        why = f"{cut} experts overlap or leave neurons out, so with every expert on it is not its dense parent"
    was = manifest.source.get("path") or "its manifest does not say where"
    where = f"that is neither where it was ({was}) nor beside the checkpoint, unchanged"
    raise UserError.of("--model", path, f"{why}, and {where}; give the dense model with --parent")

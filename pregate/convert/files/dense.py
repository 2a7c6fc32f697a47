"""Loading the dense model a conversion starts from, and refusing what cannot be converted before any work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.files.shards import INDEX, DenseShards
from pregate.convert.files.work_folder import short_digest
from pregate.model.checkpoint import file_sha256
from pregate.model.config import RoutedConfig

#: For the rare config that does not say how long a sequence may be.
DEFAULT_CONTEXT_TOKENS = 2048
#: Weights below this are hashed for the manifest; a disk takes minutes over those of a large model.
HASHED_BYTES = 2 << 30


def check_model_folder(path: Path) -> dict[str, Any]:
    """Return the fields of `config.json`; UserError when `path` is no model folder."""
    if not path.exists():
        raise UserError.of("--model", path, "no such path")
    config = path / "config.json"
    if not config.is_file():
        raise UserError.of("--model", path, "not a model folder: it has no config.json")
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError.of("--model", path, f"its config.json is not JSON ({error})") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError.of("--model", path, "its config.json is not a model's: it has no model_type")
    return fields


@contextmanager
def named(option: str) -> Iterator[None]:
    """Name `option` in errors about a folder that was given by it and not as --model."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("--model ", f"{option} ", 1)) from error


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer that lies with the model; UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError.of("--model", path, f"its tokenizer cannot be loaded ({first_line(error)})") from error


def dense_config(path: Path) -> Any:
    """Config of a dense model folder; UserError for a checkpoint that is converted already or of an unknown type."""
    if check_model_folder(path)["model_type"] == RoutedConfig.model_type:
        raise UserError.of("--model", path, "is a pregate checkpoint already; allowed: a dense model")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError.of("--model", path, f"transformers cannot read its config ({first_line(error)})") from error


def load_dense(path: Path) -> Any:
    """Load the dense model in float32; UserError when its weights are missing or damaged."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError.of("--model", path, f"its weights cannot be loaded ({first_line(error)})") from error


def context_tokens(path: Path) -> int:
    """The longest sequence the model at `path` (dense or routed) is made for, in tokens."""
    text_config = AutoConfig.from_pretrained(path).get_text_config()
    return int(getattr(text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT_TOKENS)


def source_of(path: Path) -> dict[str, Any]:
    """What the manifest keeps of the parent: absolute path, type, and the sha256 of its config, index and shards.

    Shards of `HASHED_BYTES` and more together are not hashed; `hashed` says which it was. `dtypes`: what its weights
    are stored as, the commonest first, `dtype_exceptions` those not of the commonest, by name (the conversion may
    store them otherwise, and `pregate export --format dense` gives them back).
    """
    shards = DenseShards(path)
    files, hashed = [p for p in (path / "config.json", path / INDEX) if p.is_file()], "config, index and shards"
    if sum(shard.stat().st_size for shard in shards.files) < HASHED_BYTES:
        files += shards.files
    else:
        hashed = f"config and index alone (the shards are {HASHED_BYTES} bytes or more)"
    model_type, hashes = check_model_folder(path)["model_type"], {p.name: file_sha256(p) for p in files}
    source = {"path": str(path.resolve()), "model_type": model_type, "sha256": hashes, "hashed": hashed}
    return source | {"dtypes": shards.dtypes, "dtype_exceptions": shards.dtype_exceptions}


def shards_stamp(path: Path) -> str:
    """A digest of which files the weights are and when they were written: resolved path, size and mtime of each.

    It costs the same at any size, and tells two models of one architecture and index apart.
    """
    files = [file.resolve() for file in DenseShards(path).files]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return short_digest(stamps)


def source_fields(path: Path, source: dict[str, Any]) -> dict[str, Any]:
    """What tells the dense model at `path` apart, as fields of a fingerprint; `source` is its `source_of`.

    A large model's shards are not hashed, so its path and its shards' stamp stand for them.
    """
    fields = {"--model": source["path"], "the model's shards": shards_stamp(path)}
    return fields | {f"source {name}": digest[:16] for name, digest in source["sha256"].items()}


def first_line(error: Exception) -> str:
    """What an error of a library says first; the rest is advice about the library."""
    return str(error).strip().split("\n", 1)[0]

"""Loading the dense model a conversion starts from, and refusing what cannot be converted before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.shards import DenseShards
from pregate.model.checkpoint import file_sha256
from pregate.model.config import RoutedConfig

#: For the rare config that does not say how long a sequence may be.
DEFAULT_CONTEXT_TOKENS = 2048


def check_model_folder(path: Path) -> dict[str, Any]:
    """Return the fields of `config.json`; UserError when `path` is no model folder."""
    if not path.exists():
        raise UserError.of("--model", path, "no such path")
    config = path / "config.json"
    if not config.is_file():
        raise UserError.of("--model", path, "not a model folder: it has no config.json")
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError.of("--model", path, f"its config.json is not a model's ({error!r})") from error
    return fields


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
    """What the manifest keeps of the parent: path, type, and the sha256 of its config and of its weights' index.

    Where there is no index, of the weights themselves. `dtypes`: what its weights are stored as, the commonest first
    (the conversion may store them otherwise, and `pregate export --format dense` gives them back).
    """
    weights = sorted(path.glob("*.index.json")) or sorted(path.glob("*.safetensors"))
    hashes = {p.name: file_sha256(p) for p in [path / "config.json", *weights]}
    model_type = check_model_folder(path)["model_type"]
    return {"path": str(path), "model_type": model_type, "sha256": hashes, "dtypes": DenseShards(path).dtypes}


def first_line(error: Exception) -> str:
    """What an error of a library says first; the rest is advice about the library."""
    return str(error).strip().split("\n", 1)[0]

"""A dense model in one GGUF file (llama.cpp's format): unpacked once to a model folder, which everything else reads.

The folder lies in the cache under the file's name, its sha256 and the type of the weights; removing it costs unpacking
again. transformers' loader does the work: config, tokenizer with its chat template, and weights dequantised.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pregate.base.errors import UserError, in_one_line
from pregate.convert.progress import Progress
from pregate.model.file_hashes import cache_file, file_sha256
from pregate.model.folder import is_gguf

#: What weights become where no type is said: a quantised one has none of its own.
DEFAULT_DTYPE = "bfloat16"
#: What transformers' loader asks for; the extra "gguf" brings both.
_PACKAGES = ("gguf", "accelerate")


def unpacked(path: Path, dtype: str, progress: Progress, option: str = "--model") -> Path:
    """The folder of the model in the GGUF file at `path`, weights in `dtype` ("auto": `DEFAULT_DTYPE`); any other path
    is given back.

    UserError where the extra is missing, and for a file that transformers cannot read.
    """
    if not is_gguf(path):
        return path
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        needed = f"a GGUF file needs {' and '.join(missing)}, which is not installed"
        raise UserError.of(option, path, f"{needed}; allowed with pip install 'pregate[gguf]'")
    named = DEFAULT_DTYPE if dtype == "auto" else dtype
    folder = cache_file().parent / "gguf" / f"{path.stem}-{file_sha256(path)[:16]}-{named}"
    if folder.is_dir():
        progress.note(f"{path}: unpacked before, in {folder}")
        return folder
    progress.note(f"{path}: unpacking to {folder}, weights in {named}")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _unpack(path, getattr(torch, named), partial)
    except Exception as error:  # of a file, whatever it holds: many kinds
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError.of(option, path, f"transformers cannot read it ({in_one_line(error)})") from error
    partial.rename(folder)
    return folder


def _unpack(path: Path, dtype: torch.dtype, folder: Path) -> None:
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    # Dequantised in float32 and rounded once.
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain tensors by now, and are not to be saved as anything else.
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    model.to(dtype).save_pretrained(folder)

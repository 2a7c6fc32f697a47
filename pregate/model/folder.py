"""A model folder, dense or routed, read once into one checked description that every command and the server share.

    config.json  [generation_config.json]  *.safetensors  tokenizer files  [manifest.json: a checkpoint of ours]

Keys that say how somebody's machine ran are left out (`config_fields.MACHINE_KEYS`); what cannot be honoured is refused
here, before any work. Importing and reading this loads neither torch nor transformers.
"""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pregate.base.choices import Kind
from pregate.base.errors import CheckpointError, UserError
from pregate.base.strict_json import parse_json
from pregate.model.adapter import Adapter, is_adapter, text_folder
from pregate.model.config_fields import (
    OBEYED_KEYS,
    QUANTISATION_KEYS,
    clean_fields,
    ignored_settings,
    token_ids,
    wrong_value,
)
from pregate.model.shard_file import quantised_tensor, weight_files
from pregate.model.tokenizer import FILE, TextTokenizer, load_tokenizer, tokenizer_files

ROUTED = "pregate"
GENERATION = "generation_config.json"
#: For the rare config that does not say how long a sequence may be.
DEFAULT_CONTEXT_TOKENS = 2048
_EDITORS_MARK = codecs.BOM_UTF8


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder says, checked. `option` is what gave it, for errors.

    `fields` are those of config.json that say what the model is; `generation` those of generation_config.json, as they
    are (None: there is no such file). Of these pregate obeys `eos_ids`, `repetition_penalty` and `stop_strings`;
    `notes` say what it does not. `parent` is the dense model that an adapter in `path` goes with; None for a whole
    model.
    """

    path: Path
    option: str
    fields: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    parent: Path | None = None

    @property
    def text_path(self) -> Path:
        """The folder to look for its tokenizer in."""
        return text_folder(self.path, self.parent)

    @property
    def is_routed(self) -> bool:
        return self.fields["model_type"] == ROUTED

    @property
    def text(self) -> Mapping[str, Any]:
        """The fields of the text model within: a routed checkpoint's dense parent."""
        return self.fields.get("text_config") or self.fields

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a text: generation_config.json's, where it names any, else config.json's.

        Ids outside the vocabulary end nothing.
        """
        named = (self.generation or {}).get("eos_token_id")
        if named is None:
            named = self.text.get("eos_token_id", self.fields.get("eos_token_id"))
        return frozenset(i for i in token_ids(named) if 0 <= i < self.vocab_size)

    @property
    def repetition_penalty(self) -> float:
        """What a text that asks for none gets: generation_config.json's, else 1, which is none."""
        return float((self.generation or {}).get("repetition_penalty") or 1.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end one, as `eos_ids` do: generation_config.json's."""
        named = (self.generation or {}).get("stop_strings") or ()
        return (named,) if isinstance(named, str) else tuple(named)

    @cached_property
    def vocab_size(self) -> int:
        if (size := self._or_default("vocab_size")) is None:
            raise self.refuse("its config.json has no vocab_size; allowed: a language model")
        return int(size)

    @cached_property
    def context_tokens(self) -> int:
        """The longest sequence the model is made for, in tokens."""
        return int(self._or_default("max_position_embeddings") or DEFAULT_CONTEXT_TOKENS)

    @property
    def dtype(self) -> str:
        """What the config says that the weights are stored as, in torch's name; float32 where it does not."""
        named = next((f[k] for f in (self.fields, self.text) for k in ("dtype", "torch_dtype") if f.get(k)), "float32")
        return str(named).removeprefix("torch.")

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer, for text to learn from and to measure on; UserError where there is none."""
        return load_tokenizer(self.text_path, self.vocab_size, self.option)

    def check(self, kind: Kind) -> None:
        """UserError where it is no model of this kind, by its config.json."""
        has_router = self.fields.get("path_router") is not None
        if kind == "dense" and self.is_routed:
            raise self.refuse("is a pregate checkpoint already; allowed: a dense model")
        if kind not in ("model", "dense") and not self.is_routed:
            raise self.refuse("is a dense model; convert it first with `pregate convert`")
        if kind == "layerwise" and (has_router or self.fields.get("read_network") is not None):
            raise self.refuse("already decoupled; allowed: a layer-wise checkpoint of `pregate convert`")
        if kind == "path router" and not has_router:
            raise self.refuse("has no path router; make one with `pregate decouple`")

    def refuse(self, reason: str) -> UserError:
        """An error that names the option and the folder."""
        return UserError.of(self.option, self.path, reason)

    def carry_over(self, out: Path) -> None:
        """Write tokenizer and generation settings to `out`, as they are here; a tokenizer.json is made if need be."""
        for file in tokenizer_files(self.path):
            if file.suffix in (".json", ".txt", ".jinja"):
                (out / file.name).write_bytes(file.read_bytes().removeprefix(_EDITORS_MARK))
            else:
                shutil.copyfile(file, out / file.name)
        if not (out / FILE).is_file():
            self.tokenizer.backend.save(str(out / FILE))
        if self.generation is not None:
            text = json.dumps(dict(self.generation), indent=2, sort_keys=True)
            (out / GENERATION).write_text(text + "\n", encoding="utf-8")

    def _or_default(self, key: str) -> Any:
        """A field of the text model; where config.json leaves it out, what transformers takes for its type."""
        if key in self.text:
            return self.text[key]
        from transformers import AutoConfig

        try:
            return getattr(AutoConfig.for_model(self.text["model_type"]).get_text_config(), key, None)
        except (ValueError, KeyError) as error:
            raise self.refuse(f"its config.json has no {key}") from error


def is_gguf(path: Path) -> bool:
    """Whether this is a file of llama.cpp's format, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def read_folder(path: Path, option: str = "--model", parent: Path | None = None) -> ModelFolder:
    """Read and check the model folder at `path`, which `option` gave, and with an adapter its `parent`.

    UserError, in one sentence, for what is no model folder, for a config that no model has, for quantised weights, and
    for an adapter without its parent (files are told apart by size here, not hashed).
    """
    if not path.exists():
        raise UserError.of(option, path, "no such path; allowed: a model folder")
    if is_gguf(path):
        raise UserError.of(option, path, "is a GGUF file, which `pregate convert` alone reads; allowed: a model folder")
    if not (path / "config.json").is_file():
        raise UserError.of(option, path, "not a model folder: it has no config.json")
    raw = _read_object(path, "config.json", option)
    if not isinstance(raw.get("model_type"), str):
        raise UserError.of(option, path, "its config.json is not a model's: it has no model_type")
    fields = clean_fields(raw)
    generation = _read_object(path, GENERATION, option) if (path / GENERATION).is_file() else None
    inner = fields.get("text_config") or {}
    if not isinstance(inner, dict):
        raise UserError.of(option, path, "its config.json's text_config is no object")
    for file, found in (("config.json", fields), ("config.json", inner), (GENERATION, generation or {})):
        if wrong := wrong_value(found):
            raise UserError.of(option, path, f"its {file}'s {wrong}")
    if fields["model_type"] != ROUTED:
        _refuse_quantised(path, option, raw)
    if is_adapter(path):
        Adapter(path, parent)
    whole = None if not is_adapter(path) else parent
    return ModelFolder(path, option, fields, generation, tuple(_notes(raw, fields, generation or {})), whole)


def _read_object(path: Path, name: str, option: str) -> dict[str, Any]:
    try:
        fields = parse_json((path / name).read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise CheckpointError.of(option, path, f"its {name} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError.of(option, path, f"its {name} is not a JSON object")
    return fields


def _refuse_quantised(path: Path, option: str, raw: Mapping[str, Any]) -> None:
    """Refuse weights that are numbers packed by a quantiser; a folder without weights is refused by who reads them."""
    try:
        packed = quantised_tensor(weight_files(path))
    except ValueError:
        return
    if packed:
        key = next((k for k in QUANTISATION_KEYS if raw.get(k)), "")
        method = raw[key].get("quant_method", "") if key and isinstance(raw[key], dict) else ""
        noted = f"its config.json's {key} says {method or 'so'}, and " if key else ""
        reason = f"{noted}its weights are quantised: {packed}, for one; allowed: weights in float32, float16, bfloat16"
        raise UserError.of(option, path, f"{reason} (transformers: from_pretrained, dequantize, save_pretrained)")


def _notes(raw: Mapping[str, Any], fields: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    """What the folder says and is not followed, a sentence each."""
    notes = []
    for key in QUANTISATION_KEYS:
        if raw.get(key):
            notes.append(f"config.json's {key} is left out: the weights are plain")
    if raw.get("pad_token_id") is not None and fields.get("pad_token_id") is None:
        notes.append(f"config.json's pad_token_id {raw['pad_token_id']} is no row of the embedding; it is left out")
    for file, found in (("config.json", raw), (GENERATION, generation)):
        obeyed = OBEYED_KEYS if file == GENERATION else ()
        if ignored := {k: v for k, v in ignored_settings(found).items() if k not in obeyed}:
            names = ", ".join(f"{key} {json.dumps(value)}"[:60] for key, value in ignored.items())
            reason = "what ends a text and the repetition penalty come from generation_config.json"
            notes.append(f"{file}'s {names}: not obeyed by generate or serve; {reason}, all else from each request")
    return notes

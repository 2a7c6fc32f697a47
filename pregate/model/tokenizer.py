"""The one reader of a model's tokenizer: text has the same ids where a model is calibrated, measured and served.

That is tokenizer.json, as the `tokenizers` library reads it. A folder with older files alone is read by transformers,
which makes a tokenizer.json of them. Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pregate.base.errors import CheckpointError, UserError, in_one_line
from pregate.base.strict_json import parse_json

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FILE = "tokenizer.json"
_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
#: Classes that add nothing to what the files say; those of a family have a begin-of-text of their own.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
#: What readers of one tokenizer are compared on.
_PROBES = ("Once upon a time", " Once", "two  spaces", "\n\tx = 1\n", "naïve façade, 你好 ☃ 𝄞", "<s> [INST] 3.14159")
_SHOWN_CHARS = 24


def tokenizer_folder(model: Path) -> Path:
    """Where the tokenizer's files lie: with the model, or in a folder `tokenizer` where it has none itself."""
    inner = model / "tokenizer"
    own = any(path.is_file() for pattern in _PATTERNS for path in model.glob(pattern))
    return inner if inner.is_dir() and not own else model


def tokenizer_files(model: Path) -> list[Path]:
    """The tokenizer's files of a model folder, its chat template included."""
    folder = tokenizer_folder(model)
    found = {path for pattern in (*_PATTERNS, "chat_template*") for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def read_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer.json of a model folder. CheckpointError where there is none, or it cannot be read.

    What it says of truncation and padding is how somebody trained; no text is cut or padded here.
    """
    file = tokenizer_folder(model) / FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a served model needs its tokenizer")
    from tokenizers import Tokenizer

    try:
        return _whole_texts(Tokenizer.from_str(file.read_text(encoding="utf-8-sig")))
    except Exception as error:  # the tokenizers library raises no narrower one
        raise CheckpointError(f"{file}: {error}") from error


def _whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_ids(encoding: Encoding, text: str, vocab_size: int, option: str, value: object) -> None:
    """UserError naming the first token that the model has no row for, its id, and where it stands in the text."""
    for token, token_id, (start, _stop) in zip(encoding.tokens, encoding.ids, encoding.offsets, strict=True):
        if token_id >= vocab_size:
            near = text[max(0, start - _SHOWN_CHARS) : start + _SHOWN_CHARS]
            where = f"at character {start} of a text, near {near!r}"
            reason = f"the tokenizer makes token {token!r} (id {token_id}) {where}; the model's vocabulary of"
            raise UserError.of(option, value, f"{reason} {vocab_size} ends at id {vocab_size - 1}")


def text_bytes(text: str, option: str, where: str = "") -> int:
    """The length of a text in UTF-8. UserError for half of a surrogate pair, which JSON and a command line may hold."""
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair ({text[error.start]!a}) at character {error.start}"
        named = f"{option} {where}".rstrip()
        raise UserError(f"{named}: {half}, which is no text; allowed: what UTF-8 can carry") from None


class TextTokenizer:
    """A model's tokenizer as text is learned from and measured with: no special token but those in the text.

    Called as transformers' are; `bos_token_id` is the begin-of-text that goes before a document, or None.
    """

    def __init__(
        self, tokenizer: Tokenizer, bos_token_id: int | None, vocab_size: int, option: str, path: Path
    ) -> None:
        self.backend, self.bos_token_id, self._vocab_size = tokenizer, bos_token_id, vocab_size
        self._option, self._path = option, path

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        """{"input_ids": ids} of a text. UserError for a token that the model's embedding has no row for."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        if max(encoding.ids, default=0) >= self._vocab_size:
            check_ids(encoding, text, self._vocab_size, self._option, self._path)
        return {"input_ids": encoding.ids}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids, special tokens included unless they are to be skipped."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def load_tokenizer(model: Path, vocab_size: int, option: str = "--model") -> TextTokenizer:
    """The tokenizer of a model folder of `vocab_size` rows; UserError where it has none that can be used."""
    folder = tokenizer_folder(model)
    if (folder / FILE).is_file():
        backend = read_tokenizer(model)
        bos = _bos_token(folder)
    else:
        by_transformers = _auto_tokenizer(folder, option, model)
        backend, bos = _whole_texts(by_transformers.backend_tokenizer), by_transformers.bos_token
    bos_id = None if bos is None else backend.token_to_id(bos)
    return TextTokenizer(backend, None if bos_id is None or bos_id >= vocab_size else bos_id, vocab_size, option, model)


def reading_difference(model: Path, ours: TextTokenizer) -> str:
    """Where transformers' AutoTokenizer gives other ids than tokenizer.json, or why that is not known; else empty.

    It rebuilds some classes' splitting by rules of its own (`legacy`, `add_prefix_space`).
    """
    try:
        theirs = _auto_tokenizer(tokenizer_folder(model), "--model", model)
        reads = [theirs(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _PROBES]
    except Exception as error:  # noqa: BLE001 (it goes by the folder's settings, whatever they hold)
        return f"tokenizer.json was not compared with transformers' AutoTokenizer ({in_one_line(error)})"
    for text, read in zip(_PROBES, reads, strict=True):
        if read != (ids := ours.backend.encode(text, add_special_tokens=False).ids):
            return (
                f"transformers' AutoTokenizer reads {text[:_SHOWN_CHARS]!r} as {_few(read)}, tokenizer.json as"
                f" {_few(ids)}; pregate goes by tokenizer.json from calibration to serving"
            )
    return ""


def _few(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:6]))}{', ...' if len(ids) > 6 else ''}]"


def _bos_token(folder: Path) -> str | None:
    """What the files say begins a text; where they say nothing, the default of the tokenizer's class."""
    settings = read_object(folder / "tokenizer_config.json")
    for fields in (settings, read_object(folder / "special_tokens_map.json")):
        if "bos_token" in fields:
            token = fields["bos_token"]
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise CheckpointError(
                    f"{folder}: its tokenizer's bos_token is {json.dumps(token)}; allowed: a text or null"
                )
            return token
    if settings.get("tokenizer_class") in _PLAIN_CLASSES:
        return None
    try:
        return _auto_tokenizer(folder, "--model", folder).bos_token
    except UserError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. CheckpointError for a file that is something else."""
    if not path.is_file():
        return {}
    try:
        fields = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return fields


def _auto_tokenizer(folder: Path, option: str, model: Path) -> Any:
    """The tokenizer as transformers reads it; UserError when it cannot, or not by the tokenizers library."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of a folder's files, whatever they hold: many kinds
        reason = f"its tokenizer cannot be loaded ({in_one_line(error)})"
        raise UserError.of(option, model, reason) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        reason = f"its tokenizer is no {FILE}, and transformers' {type(tokenizer).__name__} cannot write one"
        raise UserError.of(option, model, f"{reason}; allowed: a folder with {FILE}")
    return tokenizer

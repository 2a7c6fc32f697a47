"""An adapter: what a conversion adds to its dense parent; and the checkpoint that both make, read as if it lay there.

    adapter.json          which parent (sha256 of its files), how the checkpoint's shards are laid out, where rows lie
    adapter.safetensors   the tensors that the parent does not have: neuron order, gates, thresholds, path router
    the other files of the checkpoint, manifest.json among them; but a tokenizer that is the parent's is left there

Nothing is written or kept: a tensor is made when it is asked for (`adapted_shard.py`), bit for bit the checkpoint's.
Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pregate.base.errors import CheckpointError, UserError
from pregate.base.strict_json import parse_json
from pregate.model.adapted_shard import AdaptedShard, AdaptedTensors
from pregate.model.file_hashes import file_sha256, has_sha256
from pregate.model.read_check import Hashes, Recorded
from pregate.model.shard_file import FACTORS, ShardFile, weight_files
from pregate.model.tokenizer import tokenizer_folder

FORMAT_VERSION = 1
RECORD, TENSORS = "adapter.json", "adapter.safetensors"
_INSTEAD = "give it with --adapter and its parent with --parent, or make it a checkpoint with `pregate apply`"

Files = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class AdapterRecord:
    """What `adapter.json` says.

    `parent_name` is the folder's when the adapter was made; `parent_files` those of it that are read, `files` the
    adapter's own: {name: {"sha256", "bytes"}}. `shards`: the header of each of the checkpoint's. `ffns`: prefix of a
    layer's FFN in the checkpoint to the parent's gate, up and down (gate and up may be one). `names`: a tensor of the
    checkpoint to the parent's, where that is not its name less "parent.". `differs`: what of the checkpoint it was made
    from it gives back otherwise, and how that was measured; empty where it is the same, bit for bit.
    """

    parent_name: str
    parent_files: Files
    shards: dict[str, str]
    ffns: dict[str, tuple[str, str, str]]
    names: dict[str, str]
    tokenizer_of_parent: bool
    differs: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def is_adapter(folder: Path) -> bool:
    """Whether there is an adapter in `folder`."""
    return (folder / RECORD).is_file()


def read_record(folder: Path) -> AdapterRecord:
    """Read `adapter.json`; CheckpointError where it is none that we know."""
    path = folder / RECORD
    try:
        record = AdapterRecord(**parse_json(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable adapter ({error})") from error
    if record.format_version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {record.format_version}; allowed: {FORMAT_VERSION}")
    return record


def write_record(folder: Path, record: AdapterRecord) -> None:
    """Hash every file of the folder and write `adapter.json` beside them."""
    files = hashed(sorted(path for path in folder.iterdir() if path.name != RECORD))
    text = json.dumps(asdict(record) | {"files": files}, indent=1, sort_keys=True)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def hashed(paths: list[Path]) -> Files:
    """What is recorded of files."""
    return {path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in paths}


def text_folder(folder: Path, parent: Path | None) -> Path:
    """Where the tokenizer of a model folder is to be looked for: with an adapter's parent, where it has none itself."""
    if parent is None or not is_adapter(folder) or not read_record(folder).tokenizer_of_parent:
        return folder
    return parent


class Adapter:
    """The checkpoint that the adapter in `folder` makes with the dense model in `parent`; only headers are read.

    `hashes` says which files' sha256 is looked at, and when; of others the size is. CheckpointError for an adapter that
    is damaged, and for files that are not those of the parent it was made from.
    """

    def __init__(self, folder: Path, parent: Path | None, hashes: Hashes = Hashes.NONE) -> None:
        if parent is None:
            raise UserError.of("--model", folder, f"is an adapter; {_INSTEAD}")
        self.folder, self.parent, self.record = folder, parent, read_record(folder)
        for name, entry in self.record.files.items():
            if wrong := _difference(folder / name, entry, hashes.at_once(name)):
                raise self._refusal(folder / name, wrong)
        for name, entry in self.record.parent_files.items():
            if wrong := _difference(self._parent_file(name), entry, hashes.at_once(name)):
                raise self._refusal(parent / name, wrong)
        try:
            held = [folder / name for name in (TENSORS, FACTORS) if name in self.record.files]
            own, parents = ([self._open(path, hashes) for path in paths] for paths in (held, weight_files(parent)))
            tensors = AdaptedTensors(own, parents, self.record)
            self.shards = [
                AdaptedShard(folder / n, header, tensors) for n, header in sorted(self.record.shards.items())
            ]
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{folder}: {error}") from error

    def _open(self, path: Path, hashes: Hashes) -> ShardFile:
        entry = (self.record.files if path.parent == self.folder else self.record.parent_files).get(path.name)
        if entry is None or hashes is not Hashes.WHILE_READ:
            return ShardFile(path)
        return ShardFile(
            path, Recorded(entry["sha256"], self._refusal(path, f"its sha256 is not {entry['sha256'][:16]}..."))
        )

    def _parent_file(self, name: str) -> Path:
        inner = tokenizer_folder(self.parent) / name
        return inner if not (self.parent / name).is_file() and inner.is_file() else self.parent / name

    def _refusal(self, path: Path, wrong: str) -> UserError:
        """What is said of a file, its own or its parent's, that is not the recorded one."""
        if path.parent == self.folder:
            return CheckpointError(f"{path}: {wrong}")
        named = f"{self.record.parent_name}, which {self.folder.name} was made from"
        reason = f"its {path.name} is not that of {named}: {wrong}; allowed: that parent, unchanged"
        return CheckpointError.of("--parent", self.parent, reason)

    def other_files(self, names: list[str]) -> Iterator[Path]:
        """Where those files of the checkpoint that are no shards lie."""
        for name in names:
            if name not in self.record.shards:
                own = self.folder / name
                yield own if own.is_file() else tokenizer_folder(self.parent) / name


def _difference(path: Path, entry: dict[str, Any], hashes: bool) -> str:
    """In what a file is not the recorded one; empty where it is."""
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"it has {path.stat().st_size} bytes and not {entry['bytes']}"
    if hashes and not has_sha256(path, entry["sha256"]):
        return f"its sha256 is {file_sha256(path)[:16]}... and not {entry['sha256'][:16]}..."
    return ""

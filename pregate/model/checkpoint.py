"""The checkpoint folder: manifest, file checks, and reading any unit without loading the rest.

    config.json  model*.safetensors  [model.safetensors.index.json]  tokenizer files  manifest.json

Names inside the shards: `parent.<path of layer l's FFN>.experts.gate_up_proj` [R, 2M, D] and `.down_proj`
[R, D, M]; so unit (l, e) is one contiguous slice of each.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pregate.base.errors import CheckpointError, PregateError, UserError
from pregate.base.strict_json import parse_json
from pregate.model.adapter import Adapter, hashed, is_adapter
from pregate.model.file_hashes import has_sha256
from pregate.model.folder import ROUTED
from pregate.model.read_check import Hashes, Recorded
from pregate.model.shard_file import FACTORS, ITEM_BYTES, TORCH_NAMES, Shard, ShardFile

if TYPE_CHECKING:
    import torch

    from pregate.model.config import RoutedConfig

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_EXPERTS = re.compile(r"\.(\d+)\.(?:.*\.)?experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Manifest:
    """How a checkpoint was made.

    `method`: what was done, step by step, joined by "+". `files` maps file name to {"sha256": hex, "bytes": size};
    filled in on writing.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def weight_bytes(self) -> int:
        """Bytes of the shards."""
        return sum(f["bytes"] for name, f in self.files.items() if name.endswith(".safetensors") and name != FACTORS)

    @property
    def is_tuned(self) -> bool:
        """Whether weights were trained after the cut, so that all experts together are the dense parent no more."""
        return "tune" in self.method.split("+")

    def fits_routing(self, routing: str) -> bool:
        """Whether weights were tuned under `routing`: paths that came after tuning, they do not know.

        Example: those of "cmoe+tune+decouple" fit its gates (routing "layerwise"), but not its paths ("path").
        """
        steps = self.method.split("+")
        if routing == "path" and "decouple" in steps:
            steps = steps[len(steps) - steps[::-1].index("decouple") :]
        return "tune" in steps


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every file of the folder and write `manifest.json` beside them."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    write_manifest_of(folder, replace(manifest, files=hashed(paths)))


def write_manifest_of(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, of files that lie elsewhere or not at all."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`; CheckpointError when the folder is not a pregate checkpoint of a format we know."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path}: missing; not a pregate checkpoint (make one with `pregate convert`)")
    try:
        fields = parse_json(path.read_text(encoding="utf-8-sig"))
        manifest = Manifest(**fields)
        for name, entry in manifest.files.items():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str) or "/" in name:
                raise ValueError(f"entry of {name}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error})") from error
    if manifest.format_version != FORMAT_VERSION:
        known = f"allowed: {FORMAT_VERSION}; convert the dense model again"
        raise CheckpointError(f"{path}: format version {manifest.format_version}; {known}")
    return manifest


def verify_files(
    folder: Path, manifest: Manifest, hashes: Hashes, advance: Callable[[int], None] | None = None
) -> None:
    """Raise CheckpointError for a file that is missing, cut short, or (with `hashes`) changed.

    A file is hashed once, and again when it changes (`file_hashes.has_sha256`), but a shard that is hashed while it is
    read not here; `advance` is called with the bytes.
    """
    if "config.json" not in manifest.files or not any(f.endswith(".safetensors") for f in manifest.files):
        raise CheckpointError(f"{folder / MANIFEST}: lists no config.json or no shard")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        first = hashes.at_once(name) or (name == FACTORS and hashes is not Hashes.NONE)
        if first and not has_sha256(path, expected["sha256"], advance):
            raise _damaged(path)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: damaged (sha256 differs from the manifest)")


def open_shards(
    folder: Path, parent: Path | None = None, hashes: Hashes = Hashes.NONE
) -> tuple[Manifest, Sequence[Shard]]:
    """Check a checkpoint, or an adapter with its `parent`, and open the weights' shards; only headers are read.

    CheckpointError naming the file and the reason where one is missing, damaged, or not the parent's.
    """
    manifest = read_manifest(folder)
    if is_adapter(folder):
        return manifest, Adapter(folder, parent, hashes).shards
    verify_files(folder, manifest, hashes)
    shards = []
    for name in sorted(name for name in manifest.files if name.endswith(".safetensors") and name != FACTORS):
        path = folder / name
        try:
            recorded = Recorded(manifest.files[name]["sha256"], _damaged(path))
            shards.append(ShardFile(path, recorded if hashes is Hashes.WHILE_READ else None))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    return manifest, shards


class CheckpointReader:
    """Reads single units of a checkpoint; loads nothing else, and maps nothing: a unit once read stays as it was.

    An adapter's units are made of its `parent`'s neurons when they are read. Raises CheckpointError naming the file and
    the reason when the folder is foreign or damaged. With `Hashes.WHILE_READ` what is read may be used only once the
    block of `checked` that it is read in has ended.
    """

    def __init__(self, path: str | Path, parent: str | Path | None = None, hashes: Hashes = Hashes.NONE) -> None:
        self.path = Path(path)
        self.manifest, self.shards = open_shards(self.path, Path(parent) if parent else None, hashes)
        self.config = self._config()
        self._cuts = self.config.cuts  # made anew each time they are asked for, and every load asks
        self.fingerprint = hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()
        self._experts = self._index()

    def _config(self) -> RoutedConfig:
        from pregate.model.config import RoutedConfig

        path = self.path / "config.json"
        try:
            model_type = parse_json(path.read_text(encoding="utf-8-sig"))["model_type"]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a readable model config ({error!r})") from error
        if model_type != ROUTED:
            raise CheckpointError(f"{path}: model_type {model_type!r}; allowed: {ROUTED!r}")
        try:
            return RoutedConfig.from_json_file(path)  # which knows transformers' way of writing an infinity
        except Exception as error:  # transformers and its families raise many kinds
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error

    def _index(self) -> dict[tuple[int, str], tuple[Shard, str]]:
        named = ((shard, name, _EXPERTS.search(name)) for shard in self.shards for name in shard.tensors)
        found = {(int(match[1]), match[2]): (shard, name) for shard, name, match in named if match}
        for layer, cut in enumerate(self._cuts):
            if cut.num_routed and ((layer, "gate_up_proj") not in found or (layer, "down_proj") not in found):
                raise CheckpointError(f"{self.path}: layer {layer} has {cut.num_routed} routed experts but no weights")
        return found

    @property
    def num_layers(self) -> int:
        return len(self._cuts)

    @property
    def hidden_size(self) -> int:
        return self.config.text_config.hidden_size

    @property
    def hidden_act(self) -> str:
        return self.config.hidden_act

    def read_unit(
        self, layer: int, expert: int, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read unit (layer, expert): copies `gate_up` [2M, D] and `down` [D, M] in the checkpoint's dtype, each in its
        part of `out` where that is of this dtype and the checkpoint has it as it is.

        CheckpointError when the file was changed since this reader was made.
        """
        if not 0 <= layer < self.num_layers or not 0 <= expert < self._cuts[layer].num_routed:
            raise UserError(f"unit ({layer}, {expert}): not in this checkpoint")
        gate_up, down = out or (None, None)
        return self._read(layer, "gate_up_proj", expert, gate_up), self._read(layer, "down_proj", expert, down)

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Hash what of the shards was not hashed before the end of this block, in which they are read.

        CheckpointError names one that is damaged: also in place of what its damage made go wrong in the block.
        """
        try:
            yield
        except (ValueError, LookupError, TypeError) as error:
            if isinstance(error, CheckpointError) or not isinstance(error, PregateError):
                self._finish_checks()
            raise
        self._finish_checks()

    def _finish_checks(self) -> None:
        for shard in self.shards:
            try:
                shard.finish_check()
            except CheckpointError:
                raise
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{shard.path}: {error}") from error

    def file_order(self, layer: int, expert: int) -> tuple[str, int, int]:
        """What to sort units by so that they are read in the order of the files."""
        shard, name = self._experts[layer, "down_proj"]
        return str(shard.path), shard.tensors[name].start, expert

    def read_ahead(self, layer: int, expert: int) -> None:
        """Have the system bring a unit that will be read into its cache; returns at once."""
        for part in ("gate_up_proj", "down_proj"):
            shard, name = self._experts[layer, part]
            if isinstance(shard, ShardFile):  # what is computed from others is not in a file
                shard.read_ahead(name, expert)

    def _read(self, layer: int, part: str, expert: int, out: torch.Tensor | None) -> torch.Tensor:
        shard, name = self._experts[layer, part]
        try:
            return shard.read(name, expert, out)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{shard.path}: {error}") from error

    @property
    def unit_dtype(self) -> torch.dtype | None:
        """The dtype that units are stored in; None where that is not one."""
        import torch

        names = {TORCH_NAMES[shard.tensors[name].dtype] for shard, name in self._experts.values()}
        return getattr(torch, names.pop()) if len(names) == 1 else None

    def unit_bytes(self, layer: int) -> int:
        """Bytes of one unit of `layer` as stored (0 for a dense layer)."""
        cut = self._cuts[layer]
        if not cut.num_routed:
            return 0
        shard, name = self._experts[layer, "down_proj"]
        return 3 * cut.expert_width * self.hidden_size * ITEM_BYTES[shard.tensors[name].dtype]


def check_new_folder(path: Path, option: str = "--out") -> None:
    """Raise UserError unless `path` can be made: it must not exist, and its parent must, and be writable."""
    if path.exists():
        raise UserError.of(option, path, "exists already; allowed: a folder that does not exist yet")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError.of(option, path, "its parent folder does not exist")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise UserError.of(option, path, f"its parent folder cannot be written ({error.strerror})") from None


def is_disk_full(error: Exception) -> bool:
    """Whether an error of writing says that no more fits; safetensors has the number in its text."""
    numbers = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when not."""
    check_new_folder(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise PregateError(f"--out {path}: cannot be written ({error}); nothing was kept") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

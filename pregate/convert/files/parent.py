"""Which dense model a routed checkpoint is compared with: its parent, or itself where that is the same."""

from __future__ import annotations

from pathlib import Path

from pregate.base.errors import UserError
from pregate.model.checkpoint import Manifest, read_manifest
from pregate.model.file_hashes import file_sha256
from pregate.model.modeling import RoutedForCausalLM


def recorded_parent(path: Path) -> Path | None:
    """The dense model that the manifest of the checkpoint at `path` names; None where it is not found unchanged.

    It is looked for where it was (a relative path: from the working directory), then beside the checkpoint under its
    name, as folders that were moved together lie. All files that the manifest has a sha256 of must have it still; the
    weights of a large parent are not among them (`dense.HASHED_BYTES`), and other weights in their place go unseen.
    """
    source = read_manifest(path).source
    was, hashes = Path(str(source.get("path", ""))), source.get("sha256", {})
    places = (was, path.resolve().parent / was.name)
    return next((place for place in places if hashes and _holds(place, hashes)), None)


def _holds(folder: Path, hashes: dict[str, str]) -> bool:
    """Whether `folder` has files of those sha256; all are looked for before any is read."""
    files = {folder / name: digest for name, digest in hashes.items()}
    return all(file.is_file() for file in files) and all(file_sha256(f) == digest for f, digest in files.items())


def dense_of(path: Path, model: RoutedForCausalLM, given: Path | None) -> Path | None:
    """The dense model to compare the checkpoint at `path`, loaded as `model`, with; None: itself with every expert on.

    That is `given`, else the recorded parent, else itself where that is the same, all but the rounding of a smaller
    type; so a checkpoint is its own last of all. UserError naming --parent where there is none of these.
    """
    found = given or recorded_parent(path)
    if found is None:
        _check_own_parent(path, model)
    return found


def _check_own_parent(path: Path, model: RoutedForCausalLM) -> None:
    manifest = read_manifest(path)
    if difference := _difference(manifest, model):
        was = manifest.source.get("path") or "its manifest does not say where"
        where = f"that is neither where it was ({was}) nor beside the checkpoint, unchanged"
        raise UserError.of("--model", path, f"{difference}, and {where}; give the dense model with --parent")


def _difference(manifest: Manifest, model: RoutedForCausalLM) -> str:
    """Why all experts together are not the parent; empty where they are."""
    if manifest.is_tuned:
        return "was tuned, so with every expert on it is its dense parent no more"
    for mlp in model.routed_mlps:
        if not mlp.is_partition:
            overlap = f"layer {mlp.layer}'s experts overlap or leave neurons out"
            return f"{overlap}, so with every expert on it is not its dense parent"
    return ""

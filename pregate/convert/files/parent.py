"""Which dense model a routed checkpoint is compared with: its parent, or itself where that is the same."""

from __future__ import annotations

from pathlib import Path

from pregate.base.errors import UserError
from pregate.model.checkpoint import read_manifest
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

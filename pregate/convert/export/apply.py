"""`apply`: the checkpoint that an adapter was made of, written again from its dense parent, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from pregate.base.errors import UserError
from pregate.base.options import Needs, Out, options
from pregate.convert.progress import QUIET, Progress
from pregate.model.adapter import Adapter, is_adapter
from pregate.model.checkpoint import MANIFEST, new_folder, read_manifest
from pregate.model.read_check import Hashes


@options()
class ApplyOptions:
    """The dense model, the adapter made of it, and the folder to write."""

    parent: Annotated[Path, "The dense model that the adapter was made from.", Needs("model")]
    adapter: Annotated[Path, "Adapter folder, of `export --format adapter`."]
    out: Out


def apply(options: ApplyOptions, progress: Progress = QUIET) -> dict[str, Any]:
    """Write the checkpoint and return how much was written; every file has the sha256 that its manifest says.

    That is every file which the checkpoint's manifest names, and the manifest. UserError naming the file in which the
    parent is another; with an error nothing is left behind.
    """
    from pregate.convert.files.routed_shards import verified  # which loads torch

    if not is_adapter(options.adapter):
        raise UserError.of("--adapter", options.adapter, "no adapter; allowed: a folder of `export --format adapter`")
    with progress.doing("checking the parent"):
        adapter = Adapter(options.adapter, options.parent, hashes=Hashes.FIRST)
        manifest = read_manifest(options.adapter)
    with new_folder(options.out) as folder:
        with progress.stage("writing shards", len(adapter.shards)) as advance:
            for shard in adapter.shards:
                with (folder / shard.path.name).open("wb") as file:
                    for piece in shard.pieces():
                        file.write(piece)
                advance(1)
        for path in adapter.other_files([*manifest.files, MANIFEST]):
            shutil.copyfile(path, folder / path.name)
        verified(folder, progress)
    return {"files": len(manifest.files) + 1, "bytes": sum(entry["bytes"] for entry in manifest.files.values())}

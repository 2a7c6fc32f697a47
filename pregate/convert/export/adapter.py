"""A routed checkpoint as an adapter of its dense parent (`model/adapter.py`), proved by the sha256 of its every shard.

Shape letters: V vocabulary, D the parent's hidden width, C router width, I neurons of the dense FFN.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pregate.base.errors import UserError
from pregate.convert.export.options import ExportOptions
from pregate.convert.export.router_table import differences, table_factors
from pregate.convert.files.dense import recorded_parent
from pregate.convert.files.routed_shards import RoutedShards
from pregate.convert.progress import Progress
from pregate.model.adapter import TENSORS, Adapter, AdapterRecord, hashed, write_record
from pregate.model.checkpoint import MANIFEST, Manifest, write_manifest_of
from pregate.model.factors import TABLE, read_factors
from pregate.model.folder import ModelFolder, read_folder
from pregate.model.gated_mlp import GatedMLP
from pregate.model.layers import kept_float32
from pregate.model.shard_file import ShardFile, read_header, weight_files
from pregate.model.tokenizer import tokenizer_files

_NEURONS = "neuron_index"


def write_adapter(
    source: RoutedShards, folder: ModelFolder, options: ExportOptions, out: Path, progress: Progress
) -> dict[str, Any]:
    """Write the adapter of the checkpoint `source`, in `folder`, to `out`; returns its bytes and what it was proved by.

    UserError naming --parent where the dense model is not found, and the tensor that it and the adapter cannot give:
    weights tuned in full are no adapter's.
    """
    parent = _parent(folder, options)
    shards = [ShardFile(path) for path in weight_files(folder.path)]
    held = {n: _held(shard, n) for shard in shards for n in shard.tensors if _is_added(n)}
    keeps_factors = f"{TABLE}.projection" in read_factors(folder.path)
    if TABLE in held and (keeps_factors or options.router_table != "exact"):
        table = held.pop(TABLE)
        if not keeps_factors:
            embedding = source.embedding_name
            held |= table_factors(options.router_table, TABLE, table, source.read_one(embedding))
    carried = _tokenizer_is_parents(folder.path, parent.path)
    record = AdapterRecord(
        parent_name=parent.path.resolve().name,
        parent_files=hashed([*weight_files(parent.path), *(tokenizer_files(parent.path) if carried else [])]),
        shards={shard.path.name: read_header(shard.path).decode() for shard in shards},
        ffns={f"parent.{source.ffn_prefix(n)}": _ffn_names(m, source.ffn_prefix(n)) for n, m in enumerate(source.ffns)},
        names=_names(source, parent.path),
        tokenizer_of_parent=carried,
    )
    for name in source.manifest.files:
        if name not in record.shards and not (carried and name in record.parent_files):
            shutil.copyfile(folder.path / name, out / name)
    shutil.copyfile(folder.path / MANIFEST, out / MANIFEST)
    differing = _prove(source, parent.path, record, held, out, progress)
    figures: dict[str, Any] = {}
    if differing:
        figures = differences(folder, Adapter(out, parent.path), options, progress)
        record = replace(record, differs={"tensor": TABLE, "stored": options.router_table, "measured": figures})
        _write_changed_manifest(source.manifest, record, differing, out)
        write_record(out, record)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    whole = source.manifest.weight_bytes
    return {
        "parent": str(parent.path),
        "adapter_bytes": sum(sizes.values()),
        "tensor_bytes": sizes[TENSORS],
        "checkpoint_bytes": whole,
        "same_bits": not differing,
    } | figures


def _parent(folder: ModelFolder, options: ExportOptions) -> ModelFolder:
    path = options.parent or recorded_parent(folder.path)
    if path is None:
        reason = "its dense parent is neither where it was nor beside it, unchanged; give it with --parent"
        raise folder.refuse(reason)
    parent = read_folder(path, "--parent")
    if parent.is_routed:
        raise parent.refuse("is a routed checkpoint; allowed: the dense model that --model was made from")
    return parent


def _is_added(name: str) -> bool:
    """Whether a conversion adds this tensor to what the parent has."""
    return kept_float32(name) or name.endswith(f".{_NEURONS}")


def _held(shard: ShardFile, name: str) -> torch.Tensor:
    """A tensor as the adapter holds it: neuron numbers in 16 bits where they fit."""
    tensor = shard.read(name)
    fits = name.endswith(_NEURONS) and int(tensor.max()) < 1 << 16
    return tensor.to(torch.uint16) if fits else tensor


def _ffn_names(mlp: GatedMLP, prefix: str) -> tuple[str, str, str]:
    """The parent's names of gate, up and down; a fused pair is both gate and up."""
    named = {id(p): prefix + name for name, p in mlp.module.named_parameters()}
    down = named.pop(id(mlp.down))
    fused = next(iter(named.values()))
    return named.get(id(mlp.gate), fused), named.get(id(mlp.up), fused), down


def _names(source: RoutedShards, parent: Path) -> dict[str, str]:
    """Names that are not the parent's: of a tied tensor, stored under another, and the one the router's table is of."""
    have = {name for path in weight_files(parent) for name in ShardFile(path).tensors}
    tied: Mapping[str, str] = dict(source.parent.all_tied_weights_keys)
    others = {f"parent.{owner}": target for target, owner in tied.items() if owner not in have and target in have}
    return others | ({TABLE: f"parent.{source.embedding_name}"} if source.config.has_path_router else {})


def _tokenizer_is_parents(folder: Path, parent: Path) -> bool:
    ours, theirs = ({p.name: p for p in tokenizer_files(path)} for path in (folder, parent))
    return ours.keys() == theirs.keys() and all(p.read_bytes() == theirs[n].read_bytes() for n, p in ours.items())


def _prove(
    source: RoutedShards,
    parent: Path,
    record: AdapterRecord,
    held: dict[str, torch.Tensor],
    out: Path,
    progress: Progress,
) -> dict[str, str]:
    """Write the adapter's tensors so that with the parent it gives back every shard, bit for bit.

    Small tensors that are not the parent's any more are held too. Returns the sha256 of shards that differ because the
    router's table is stored otherwise. UserError for a tensor that cannot be given back.
    """
    while True:
        save_file(held, out / TENSORS, metadata={"format": "pt"})
        (out / TENSORS).chmod(0o644)
        write_record(out, record)
        adapter, differing, small = Adapter(out, parent), {}, {}
        with progress.stage("checking shards", len(adapter.shards)) as advance:
            for shard in adapter.shards:
                digest = hashlib.sha256()
                for piece in shard.pieces():
                    digest.update(piece)
                if digest.hexdigest() != source.manifest.files[shard.path.name]["sha256"]:
                    own = ShardFile(source.folder / shard.path.name)
                    other = [n for n in shard.tensors if not _same(own.read(n), shard.read(n))]
                    small |= {n: own.read(n) for n in other if len(own.tensors[n].shape) < 2}
                    _refuse([n for n in other if n != TABLE and n not in small], source, parent)
                    differing[shard.path.name] = digest.hexdigest()
                advance(1)
        if not small:
            return differing
        held |= small


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def _refuse(names: list[str], source: RoutedShards, parent: Path) -> None:
    if not names:
        return
    made = source.manifest.options.get("tune", {})
    where = f"{source.folder}: {names[0].removeprefix('parent.')} ({len(names)} tensors in all) is not that of {parent}"
    keeps = "an adapter holds a tuning only by `tune --method lora --no-refit`, which keeps its factors"
    if not source.manifest.is_tuned:
        why = "the checkpoint was not made from that parent, or its weights were changed since"
    elif made.get("method") == "lora":
        why = f"it was tuned after its down projections were fitted anew (--refit), or its factors are gone; {keeps}"
    else:
        why = f"it was tuned in full; {keeps}"
    raise UserError.of("--format", "adapter", f"{where}: {why}")


def _write_changed_manifest(manifest: Manifest, record: AdapterRecord, differing: dict[str, str], out: Path) -> None:
    """The manifest of the checkpoint that the adapter gives: what differs has other hashes, and is said."""
    files = {name: entry | {"sha256": differing.get(name, entry["sha256"])} for name, entry in manifest.files.items()}
    options = manifest.options | {"adapter": {"router_table": record.differs["stored"]}}
    figures = manifest.figures | {"adapter": record.differs["measured"]}
    write_manifest_of(out, replace(manifest, options=options, figures=figures, files=files))

"""Back to the dense parent: every neuron to its old place, under the parent's own names and in its own type.

Shape letters: D hidden width, I neurons of the dense FFN.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from pregate.base.errors import UserError
from pregate.convert.cut.conversion import shard_name
from pregate.convert.files.assembly import as_stored
from pregate.convert.files.dense import recorded_parent
from pregate.convert.files.routed_shards import CutFFN, RoutedShards
from pregate.convert.files.shards import DenseShards, write_index, write_shard
from pregate.convert.progress import QUIET, Progress
from pregate.model.gated_mlp import GatedMLP


def check_dense(source: RoutedShards, progress: Progress = QUIET) -> None:
    """UserError for a checkpoint that does not hold its parent's neurons any more."""
    if source.manifest.is_tuned:
        reason = f"was tuned ({source.manifest.method}): its neurons are no longer the parent's"
        raise UserError.of("--format", "dense", f"{source.folder} {reason}; allowed: the checkpoint before tuning")
    with progress.stage("checking layers", source.num_layers) as advance:
        for index in range(source.num_layers):
            neurons = source.ffn(index).neuron_index
            if not torch.equal(neurons.sort().values, torch.arange(source.ffns[index].width)):
                reason = "its neuron_index is no permutation: experts overlap or leave neurons out"
                raise UserError.of("--format", "dense", f"layer {index} of {source.folder}: {reason}")
            advance(1)


def write_dense(source: RoutedShards, folder: Path, dtype: str | None, progress: Progress) -> dict[str, Any]:
    """Write the parent's config and shards to `folder`; returns what was written and how it compares to the parent.

    `dtype` None: each tensor in the parent's own type, wherever that holds what the checkpoint has.
    """
    last = source.num_layers
    with progress.stage("writing layers", last) as advance:
        for index in range(last):
            names = ffn_tensors(source.ffns[index], source.ffn_prefix(index), source.ffn(index))
            _save(source.layer(index) | names, folder / shard_name(index, last), source, dtype)
            advance(1)
    _save(source.outer(), folder / shard_name(last, last), source, dtype)
    write_index(folder)
    dtypes = DenseShards(folder).dtypes
    config = deepcopy(source.config.text_config)
    config.architectures, config.dtype = [type(source.parent).__name__], dtypes[0]
    config.save_pretrained(folder)
    with progress.doing("comparing with the parent"):
        return {"stored_as": ", ".join(dtypes)} | compare_with_parent(source, folder)


def ffn_tensors(mlp: GatedMLP, prefix: str, ffn: CutFFN) -> dict[str, torch.Tensor]:
    """The parent's FFN tensors, under its own names: `mlp` is the parent's module, which may be fused."""
    gate_ID, up_ID, down_DI = undo_cut(ffn)
    own = {id(mlp.down): down_DI, id(mlp.gate): gate_ID, id(mlp.up): up_ID}
    named = mlp.module.named_parameters()
    return {prefix + name: own.get(id(p), torch.cat([gate_ID, up_ID])) for name, p in named}


def undo_cut(ffn: CutFFN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The FFN as the parent has it: gate and up [I, D], down [D, I].

    Example: neuron_index [2, 0, 1] and rows a, b, c give rows b, c, a.
    """
    parts = [ffn.shared] if ffn.shared is not None else []
    if ffn.experts is not None:
        parts += list(zip(*ffn.experts, strict=True))
    gates, ups = zip(*(gate_up.chunk(2) for gate_up, _down in parts), strict=True)
    order = ffn.neuron_index.argsort()
    down = torch.cat([down for _gate_up, down in parts], dim=1)
    return torch.cat(gates)[order], torch.cat(ups)[order], down[:, order]


def compare_with_parent(source: RoutedShards, folder: Path) -> dict[str, Any]:
    """How the written tensors compare with the parent's, if it is found (`recorded_parent`)."""
    parent = recorded_parent(source.folder)
    if parent is None:
        return {"parent": f"{source.manifest.source['path']} is not there, or has changed since: not compared"}
    written, dense = DenseShards(folder), DenseShards(parent)
    cpu, differing, left_out = torch.device("cpu"), [], 0
    for name, tensor in dense.tensors.items():
        if name not in written.tensors:  # a tied head stored twice, or a buffer that is computed
            left_out += 1
        elif tensor.dtype != written.tensors[name].dtype or not torch.equal(
            dense.read([name], cpu)[name], written.read([name], cpu)[name]
        ):
            differing.append(name)
    compared = len(dense.tensors) - left_out
    figures: dict[str, Any] = {"parent": str(parent), "tensors_equal": f"{compared - len(differing)} of {compared}"}
    if differing:
        types = f"the parent is stored as {', '.join(dense.dtypes)}, the checkpoint as {source.dtype}"
        figures["differing"] = f"{differing[0]}, for one; {types}"
    return figures


def _save(tensors: dict[str, torch.Tensor], path: Path, source: RoutedShards, dtype: str | None) -> None:
    """Write each tensor as the first type that holds its every value: what the parent stores it as, then what it
    stores others as; where none does, as the checkpoint has it. `dtype`: as that.
    """
    origin = source.manifest.source
    known, exceptions = origin.get("dtypes") or [source.dtype], origin.get("dtype_exceptions", {})
    cast = {}
    for name, tensor in tensors.items():
        best = [dtype] if dtype else [exceptions.get(name, known[0]), *known]
        tried = (as_stored(tensor, getattr(torch, one)) for one in best)
        exact = (one for one in tried if torch.equal(one.to(tensor.dtype), tensor))
        cast[name] = next(exact, as_stored(tensor, getattr(torch, dtype or source.dtype))).contiguous()
    write_shard(cast, path)

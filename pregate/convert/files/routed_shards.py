"""Reading a routed checkpoint layer by layer, by the names its dense parent has for the tensors.

Shape letters: D hidden width, I neurons of the dense FFN, M expert width, R routed experts, S shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pregate.base.dtypes import dtype_name
from pregate.convert.files.shards import DenseShards
from pregate.convert.progress import QUIET, Progress
from pregate.model.checkpoint import Manifest, read_manifest, verify_files
from pregate.model.config import RoutedConfig
from pregate.model.folder import ModelFolder
from pregate.model.gated_mlp import GatedMLP, decoder_layers, find_gated_mlps
from pregate.model.read_check import Hashes


def verified(folder: Path, progress: Progress) -> Manifest:
    """The manifest of a checkpoint all of whose files are as it says; CheckpointError names the one that is not."""
    manifest = read_manifest(folder)
    num_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    with progress.stage("checking files (bytes)", num_bytes) as advance:
        verify_files(folder, manifest, Hashes.FIRST, advance)
    return manifest


@dataclass(frozen=True)
class CutFFN:
    """One layer's cut FFN. `shared` [2SM, D] and [D, SM], `experts` [R, 2M, D] and [R, D, M]: gate-up, and down.

    `gate` and `bias` are those of the linear gate [R, D], [R]; `neuron_index` int64 [I], the parent's neuron of every
    row, shared rows first, then expert by expert.
    """

    neuron_index: torch.Tensor
    shared: tuple[torch.Tensor, torch.Tensor] | None
    experts: tuple[torch.Tensor, torch.Tensor] | None
    gate: torch.Tensor | None
    bias: torch.Tensor | None


class RoutedShards:
    """The tensors of a routed checkpoint, float32, read when asked for; nothing is held.

    UserError for a dense model, CheckpointError for a folder that is damaged or foreign.
    """

    def __init__(self, source: ModelFolder, progress: Progress = QUIET) -> None:
        source.check("routed")
        self.folder: Path = source.path
        self.manifest = verified(self.folder, progress)
        self.config: Any = RoutedConfig.from_pretrained(self.folder)
        with torch.device("meta"):
            #: The parent without weights: it knows the names.
            self.parent: Any = AutoModelForCausalLM.from_config(self.config.text_config)
        self.ffns: list[GatedMLP] = find_gated_mlps(self.parent)
        layers = decoder_layers(self.parent)
        self.layers_name = next(name for name, module in self.parent.named_modules() if module is layers)
        self._shards = DenseShards(self.folder)
        self._names = [n.removeprefix("parent.") for n in self._shards.tensors if n.startswith("parent.")]

    @property
    def num_layers(self) -> int:
        return len(self.ffns)

    @property
    def dtype(self) -> str:
        """What the weights are stored as, in torch's name."""
        return dtype_name(self.config.dtype or torch.float32)

    @property
    def embedding_name(self) -> str:
        """The parent's table of tokens, by its name there."""
        table = self.parent.get_input_embeddings().weight
        return next(name for name, p in self.parent.named_parameters() if p is table)

    def read_one(self, name: str) -> torch.Tensor:
        """One of the parent's tensors, by its name there."""
        return self._read([name])[name]

    def ffn_prefix(self, index: int) -> str:
        """What the names of a layer's FFN begin with, in the parent."""
        return f"{self.layers_name}.{index}.{self.ffns[index].attribute}."

    def outer(self) -> dict[str, torch.Tensor]:
        """The parent's tensors outside the layers; a tied head is not among them."""
        return self._read([n for n in self._names if not n.startswith(f"{self.layers_name}.")])

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The parent's tensors of one layer, its FFN left out."""
        start = f"{self.layers_name}.{index}."
        return self._read([n for n in self._names if n.startswith(start) and not n.startswith(self.ffn_prefix(index))])

    def ffn(self, index: int) -> CutFFN:
        """One layer's cut FFN."""
        prefix = self.ffn_prefix(index)
        found = self._read([n for n in self._names if n.startswith(prefix)])
        own = {name.removeprefix(prefix): tensor for name, tensor in found.items()}

        def pair(part: str) -> tuple[torch.Tensor, torch.Tensor] | None:
            return (own[f"{part}.gate_up_proj"], own[f"{part}.down_proj"]) if f"{part}.down_proj" in own else None

        gate, bias = own.get("linear_gate.weight"), own.get("linear_gate.bias")
        return CutFFN(own["neuron_index"].long(), pair("shared"), pair("experts"), gate, bias)

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        found = self._shards.read([f"parent.{name}" for name in names], torch.device("cpu"))
        return {name.removeprefix("parent."): tensor for name, tensor in found.items()}

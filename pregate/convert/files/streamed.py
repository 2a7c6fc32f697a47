"""Models whose layers are read from their shards when they run, and dropped when they have: memory holds one of them.

Embeddings, norms and head stay, and of a routed layer `layers.FLOAT32_PARTS` and the neurons' places: they are small,
and are looked at and set between runs. A small model is held whole, which spares reading it at every run.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from transformers import GenerationConfig

from pregate.convert.files.dense import load_dense
from pregate.convert.files.routed_shards import verified
from pregate.convert.files.shards import DenseShards
from pregate.convert.files.skeleton import Skeleton
from pregate.convert.progress import QUIET, Progress
from pregate.model.checkpoint import read_manifest
from pregate.model.config import RoutedConfig
from pregate.model.folder import ModelFolder
from pregate.model.layers import kept_float32
from pregate.model.modeling import RoutedForCausalLM

#: A model of at most so many bytes in float32 is held whole on the CPU; on a GPU one of half of what is free there.
WHOLE_BYTES = 2 << 30


def load_any(folder: ModelFolder, progress: Progress = QUIET, device: torch.device | str = "cpu") -> Any:
    """A routed or a dense model in float32, to run and to measure, not to train; layer by layer where it is large."""
    device = torch.device(device)
    if fits_whole(folder, device):
        return load_whole(folder, progress).to(device)
    if folder.is_routed and folder.parent is None:
        verified(folder.path, progress)
    return streamed(folder, device)


def load_whole(folder: ModelFolder, progress: Progress = QUIET) -> Any:
    """A routed or a dense model in float32, to do anything with."""
    if not folder.is_routed:
        return load_dense(folder, progress)
    if folder.parent is None:  # an adapter's files are compared with its parent's as they are opened
        verified(folder.path, progress)
    settings = {"parent": folder.parent, "dtype": torch.float32, "hashes": None if folder.parent else False}
    with progress.doing(f"loading {folder.path.name}"):
        return RoutedForCausalLM.from_pretrained(folder.path, **settings).eval()


def fits_whole(folder: ModelFolder, device: torch.device) -> bool:
    """Whether `load_any` holds the model whole on `device`."""
    size = sum(4 * prod(stored.shape) for stored in DenseShards.of(folder).tensors.values())
    return size <= (WHOLE_BYTES if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 2)


def streamed(folder: ModelFolder, device: torch.device) -> Any:
    """A routed or a dense model, its layers read when they run. UserError as of `Skeleton`."""
    skeleton = RoutedSkeleton(folder, device) if folder.is_routed else Skeleton(folder, device)
    stays = set(skeleton.outer_names)
    for index, layer in enumerate(skeleton.layers):
        names = skeleton.layer_names(index)
        kept = [name for name in names if kept_float32(name) or name.endswith("neuron_index")]
        stays.update(kept)
        del layer.forward  # of a skeleton's layers it passes through
        _stream(skeleton, layer, [name for name in names if name not in kept])
    skeleton.load(sorted(stays))
    model = skeleton.whole
    picking = {"eos_token_id": sorted(folder.eos_ids) or None, "repetition_penalty": folder.repetition_penalty}
    model.generation_config = GenerationConfig(**picking)
    return model


def _stream(skeleton: Skeleton, layer: Any, names: list[str]) -> None:
    def load(*_args: Any) -> None:
        skeleton.load(names)

    def drop(*_args: Any) -> None:  # what a hook returns would be the layer's output
        skeleton.drop(names)

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(drop, always_call=True)


class RoutedSkeleton(Skeleton):
    """A routed checkpoint without its weights; `whole` is the routed model, `model` its parent."""

    prefix = "parent."

    def _without_weights(self) -> Any:
        config: Any = RoutedConfig.from_pretrained(self.folder.path)
        config.text_config.dtype = torch.float32
        with torch.device("meta"):
            self.routed = RoutedForCausalLM(config)
        self.routed.eval().requires_grad_(False)
        self.routed.manifest = read_manifest(self.folder.path)
        for part in ("path_router", "read_network"):
            if (router := getattr(self.routed, part)) is not None:
                shards, start = DenseShards.of(self.folder), f"{part}."
                tensors = shards.read([n for n in shards.tensors if n.startswith(start)], self.device)
                router.thresholds = torch.zeros(
                    router.thresholds.shape, device=self.device
                )  # none are stored of a number
                router.load_state_dict({n.removeprefix(start): t for n, t in tensors.items()}, assign=True)
        return self.routed.parent

    @property
    def whole(self) -> RoutedForCausalLM:
        return self.routed

"""A dense model cut for measurements of speed: neurons in their own order, an untrained path router.

What a step costs depends on shapes and on how many experts run, not on which neurons they hold; an untrained router
spreads tokens evenly over experts, so a batch reads at least as many of them as with a trained one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pregate.model.checkpoint import Manifest
from pregate.model.config import RoutedConfig
from pregate.model.gated_mlp import find_gated_mlps
from pregate.model.modeling import RoutedForCausalLM


@torch.no_grad()
def random_cut(
    parent_folder: Path,
    out: Path,
    *,
    experts: int,
    shared: int,
    active: int,
    skew: float = 0.0,
    heads: str = "independent",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `out`, unless it is there: S`shared`A`active`E`experts` of the dense model, whose paths are exact.

    With `skew` the router favours some experts of each layer, in an order of its own: the n-th by `skew` log n less
    than the first, in standard deviations of the score that the token gives, so that use falls as a power of n or so.
    `heads` "single": one index for all layers.
    """
    assert not skew or heads == "independent", "experts are favoured layer by layer"
    if out.exists():
        return out
    torch.manual_seed(0)
    parent: Any = AutoModelForCausalLM.from_pretrained(parent_folder, dtype=dtype)
    mlps = find_gated_mlps(parent)
    width = mlps[0].width // experts
    cut = {"num_routed": experts - shared, "num_shared": shared, "num_active": active, "expert_width": width}
    config = RoutedConfig(
        parent.config, [cut] * len(mlps), routing="path", selection="top_k", path_router={"heads": heads}, gate="linear"
    )
    model: Any = RoutedForCausalLM._from_config(config, dtype=dtype)
    model.path_router.float()  # as converted checkpoints have it
    kept = {n: p for n, p in parent.state_dict().items() if ".mlp." not in n}
    missing = model.parent.load_state_dict(kept, strict=False)
    assert not missing.unexpected_keys
    for mlp, routed in zip(mlps, model.routed_mlps, strict=True):
        gates, ups, downs = mlp.gate.split(width), mlp.up.split(width), mlp.down.split(width, dim=1)
        assert routed.shared is not None and routed.experts is not None
        routed.shared.gate_up_proj.copy_(torch.cat([*gates[:shared], *ups[:shared]]))
        routed.shared.down_proj.copy_(torch.cat(downs[:shared], dim=1))
        routed.experts.gate_up_proj.copy_(torch.stack([torch.cat(p) for p in zip(gates, ups, strict=True)][shared:]))
        routed.experts.down_proj.copy_(torch.stack(downs[shared:]))
        routed.neuron_index.copy_(torch.arange(len(routed.neuron_index)))
    if skew:
        assert model.path_router is not None
        ranks = torch.arange(1, experts - shared + 1).log()
        bias = torch.cat([ranks[torch.randperm(len(ranks))] for _ in mlps])
        model.path_router.heads.get_parameter("bias").sub_(skew * _spread(model) * bias)
    model.manifest = Manifest(method="random cut, for measurements of speed")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(parent_folder).save_pretrained(out)
    return out


def _spread(model: RoutedForCausalLM) -> float:
    """How far the scores of the untrained router lie apart over tokens (their standard deviation)."""
    assert model.path_router is not None
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, 256))
    return float(model.path_router(ids)[0].std(dim=1).mean())

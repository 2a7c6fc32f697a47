"""How large a path router or read network is, and how much it learns from, where its user does not say: by the dense
model's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pregate.convert.paths.options import DecoupleOptions
from pregate.model.config import ReadNetworkConfig, RoutedConfig
from pregate.model.layers import kept_float32
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.router_flops import MAX_SHARE, backbone_flops, read_flops, router_flops

#: For a model beside which a wide router costs little, and for a smaller one.
LARGE: dict[str, Any] = {"blocks": 2, "window": 112, "embedding": "parent", "pool_tokens": 400_000, "steps": 4500}
SMALL: dict[str, Any] = {
    "dim": 128, "blocks": 1, "window": 64, "embedding": "own", "pool_tokens": 200_000, "steps": 2000,
}  # fmt: skip
#: Widths of a large model's router; below the last it is a small one's.
WIDTHS = range(512, 96, -32)
#: Widths of a read network; the last is taken where none costs little enough.
READ_WIDTHS = range(1024, 0, -32)


def sized(options: DecoupleOptions, config: RoutedConfig) -> DecoupleOptions:
    """`options` with those set that are None and follow the dense model's operations per token.

    The widest router of `LARGE` that costs at most `MAX_SHARE` of them; where not even the narrowest does, `SMALL`. A
    read network has the width that its own operations allow, and learns for as long as a path router of that model.
    """
    if options.read_layers is not None:
        as_router = sized(replace(options, read_layers=None, dim=None), config)
        dim = options.dim or _read_width(options.read_layers, config)
        return replace(options, dim=dim, steps=as_router.steps, pool_tokens=as_router.pool_tokens)
    most = MAX_SHARE * dense_flops(config)
    for each in _candidates(options):
        if router_flops(each.shape(), config.cuts, config.selection) <= most:
            return each
    return _filled(options, SMALL)


def _read_width(layer: int, config: RoutedConfig) -> int:
    most, width = MAX_SHARE * dense_flops(config), config.text_config.hidden_size
    fitting = (n for n in READ_WIDTHS if read_flops(ReadNetworkConfig(layer, n), width, config.cuts) <= most)
    return next(fitting, READ_WIDTHS[-1])


def _candidates(options: DecoupleOptions) -> Iterator[DecoupleOptions]:
    for dim in WIDTHS:
        yield _filled(options, LARGE | {"dim": dim})


def _filled(options: DecoupleOptions, values: dict[str, Any]) -> DecoupleOptions:
    return replace(options, **{name: value for name, value in values.items() if getattr(options, name) is None})


def dense_flops(config: Any) -> int:
    """Operations per token of the dense parent: of its parameters, less an embedding that is only looked up in (one
    tied to the head is not)."""
    with torch.device("meta"):
        model = RoutedForCausalLM(config)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (getattr(end, "weight", None) for end in ends)
    weights = {id(p): p.numel() for n, p in model.parent.named_parameters() if not kept_float32(n)}
    return backbone_flops(sum(weights.values()) - (0 if embedding is head or embedding is None else embedding.numel()))

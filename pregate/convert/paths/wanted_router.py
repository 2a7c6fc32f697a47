"""What `decouple` is to train, by its options: a path router, or a read network; what it costs, and a model with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pregate.base.errors import UserError
from pregate.convert.files.assembly import assemble
from pregate.convert.paths.losses import Router
from pregate.convert.paths.options import DecoupleOptions
from pregate.convert.paths.size import dense_flops
from pregate.model.config import ReadNetworkConfig, RoutedConfig
from pregate.model.folder import ModelFolder
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathRouter
from pregate.model.read_gate import ReadNetwork
from pregate.model.router_flops import MAX_SHARE, read_flops, router_flops


def check_read_layers(layer: int, config: RoutedConfig, source: ModelFolder) -> None:
    """UserError for a layer that cannot be read, and for gates before it that are not linear."""
    ReadNetworkConfig(layer, 1).check(len(config.cuts))
    chooses = [n for n, cut in enumerate(config.cuts) if n and 0 < cut.num_active < cut.num_routed]
    if layer not in chooses:  # the network runs when that layer's gate is asked
        allowed = f"allowed: {', '.join(map(str, chooses))}" if chooses else "and none after it has"
        raise UserError.of("--read-layers", layer, f"layer {layer}, from 0, has no experts to choose from; {allowed}")
    if config.gate != "linear":
        raise source.refuse(f"has {config.gate} gates; allowed with --read-layers: linear")


def new_router(options: DecoupleOptions, config: RoutedConfig) -> Router:
    """It, with the weights it starts from."""
    text = config.text_config
    if options.read_layers is None:
        return PathRouter(options.shape(), text.vocab_size, config.cuts, config.selection)
    return ReadNetwork(options.read_shape(), text.hidden_size, config.cuts, config.selection)


def cost(options: DecoupleOptions, config: RoutedConfig) -> dict[str, Any]:
    """Its operations per token and their share of the dense parent's; a warning where that is much."""
    if options.read_layers is None:
        name, smaller = "path router", "--dim, --window or --blocks"
        flops = router_flops(options.shape(), config.cuts, config.selection)
    else:
        name, smaller = "read network", "--dim"
        flops = read_flops(options.read_shape(), config.text_config.hidden_size, config.cuts)
    share = flops / dense_flops(config)
    figures = {"router_flops_per_token": flops, "router_flops_share": round(share, 5)}
    if share <= MAX_SHARE:
        return figures
    much = f"the {name} costs {share:.1%} of the dense model's operations, more than {MAX_SHARE:.0%}"
    return figures | {"warning": f"{much}; a smaller {smaller} costs less"}


def routed_with(model: RoutedForCausalLM, router: Router, options: DecoupleOptions) -> RoutedForCausalLM:
    """`model` with `router`, which decides or, with `predict`, forecasts; the parent is the same one, so that a read
    network decides in `model`, too, from then on."""
    config = RoutedConfig.from_dict(model.config.to_dict() | added(options))
    if isinstance(router, ReadNetwork):
        return assemble(config, model.parent, read_network=router)
    return assemble(config, model.parent, router)


def added(options: DecoupleOptions) -> dict[str, Any]:
    """The fields of a config that come with it."""
    if options.read_layers is not None:
        return {"gate": "read", "read_network": asdict(options.read_shape())}
    return {"routing": "layerwise" if options.predict else "path", "path_router": asdict(options.shape())}

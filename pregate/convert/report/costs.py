"""What a token costs, dense and routed: operations of all matrix products, and bytes of the weights they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pregate.model.modeling import RoutedForCausalLM
from pregate.model.router_flops import backbone_flops, read_flops, router_flops

#: Gates and path router are stored and run in float32 (`model.layers.FLOAT32_PARTS`).
ROUTER_ITEM_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """One part of the model: operations (a multiply and an add are two) and bytes per token, dense and routed."""

    name: str
    dense_flops: int
    routed_flops: int
    dense_bytes: int
    routed_bytes: int


@dataclass(frozen=True)
class Costs:
    """The parts, whose last is their sum; `router_share`: the path router's of the dense model's operations.

    Attention over earlier tokens, the same in both models, is apart: what each of them adds.
    """

    parts: tuple[Cost, ...]
    router_share: float
    flops_per_earlier: int
    bytes_per_earlier: int

    @property
    def total(self) -> Cost:
        return self.parts[-1]


def costs(model: RoutedForCausalLM, active_share: float, item_bytes: int) -> Costs:
    """Costs of a token decoded alone, of whose FFN `active_share` runs; weights are stored with `item_bytes` each.

    Left out: norms' and activations' own work, the choice of experts, looking up embeddings.
    """
    config, text = model.config, model.config.text_config
    head: Any = model.get_output_embeddings()
    mlps, embedding = model.routed_mlps, model.get_input_embeddings()
    ffn = sum(3 * text.hidden_size * mlp.parent_width for mlp in mlps)
    apart = {id(p) for module in (*mlps, embedding, head) for p in module.parameters()}
    attention = sum(p.numel() for p in model.parent.parameters() if id(p) not in apart)

    def weights(name: str, number: int, share: float = 1.0) -> Cost:
        """A part that multiplies by so many weights, routed by a share of them."""
        flops, num_bytes = backbone_flops(number), number * item_bytes
        return Cost(name, flops, round(flops * share), num_bytes, round(num_bytes * share))

    parts = [weights("attention, norms", attention), weights("output head", head.weight.numel())]
    parts.append(weights("FFN", ffn, active_share))
    if config.routing == "layerwise":
        network = model.read_network
        gated = config.cuts if network is None else config.cuts[: network.config.layer]
        each = 1 if config.gate in ("linear", "read") else 2
        gates = sum(each * text.hidden_size * cut.num_routed for cut in gated)
        parts.append(Cost("gates", 0, backbone_flops(gates), 0, gates * ROUTER_ITEM_BYTES))
        if network is not None:
            num_weights = sum(p.numel() for p in network.parameters())
            flops = read_flops(network.config, text.hidden_size, config.cuts)
            parts.append(Cost("read network", 0, flops, 0, num_weights * ROUTER_ITEM_BYTES))
    if (router := model.path_router) is not None:
        num_weights = sum(p.numel() for p in router.parameters()) - router.embedding.weight.numel()
        flops = router_flops(router.config, config.cuts, router.selection)
        parts.append(Cost("path router", 0, flops, 0, num_weights * ROUTER_ITEM_BYTES))
    names = ("dense_flops", "routed_flops", "dense_bytes", "routed_bytes")
    total = Cost("all", *(sum(getattr(part, name) for part in parts) for name in names))
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    routing = sum(part.routed_flops for part in parts if part.name == "path router")
    earlier = 4 * len(mlps) * heads * width, 2 * len(mlps) * kv_heads * width * item_bytes
    return Costs((*parts, total), routing / total.dense_flops, *earlier)

"""`RoutedConfig`: the dense parent's config and how each of its layers was cut."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any, get_args

from transformers import AutoConfig, PretrainedConfig

from pregate.base.choices import Gate, Heads, RouterGate, RouterWeights, Selection
from pregate.base.errors import UserError
from pregate.model.config_fields import clean_fields

ROUTINGS = ("layerwise", "path")
#: Those of `convert`, and "read", which `decouple --read-layers` makes.
GATES, SELECTIONS = (*get_args(Gate), "read"), get_args(Selection)
ROUTER_CHOICES = {"heads": get_args(Heads), "gate": get_args(RouterGate), "weights": get_args(RouterWeights)}


@dataclass(frozen=True)
class LayerCut:
    """How one layer's FFN was cut. Total experts E = num_routed + num_shared; 0 routed is a dense layer.

    `num_active` routed experts are chosen per token: exactly, or with selection by threshold on average.
    `expert_width` is m, the neurons of one expert; the shared expert is num_shared * m wide, stored as one.
    """

    num_routed: int
    num_shared: int
    num_active: int
    expert_width: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_active <= self.num_routed:
            raise UserError.of("num_active", self.num_active, f"allowed: 0 to {self.num_routed} (num_routed)")
        if self.num_shared < 0 or self.expert_width < 1:
            raise UserError.of("layer cut", asdict(self), "num_shared must be 0 or more, expert_width 1 or more")

    @property
    def shared_width(self) -> int:
        return self.num_shared * self.expert_width


@dataclass(frozen=True)
class PathRouterConfig:
    """Shape of the path router: embedding width, blocks, attention heads, attention window in tokens.

    `heads`: "independent" (a linear map for each layer), "recurrent" (a cell runs over the layers) or "single" (one
    choice for all layers). `gate`: "scores" or "dselect" (`dselect.py`). `weights` of the chosen experts: "one", or
    "learned" (`PathRouter.expert_weights`). `hold_share`: thresholds follow a text (`share_control.py`).
    """

    dim: int = 128
    num_blocks: int = 1
    num_heads: int = 4
    window: int = 64
    heads: str = "independent"
    gate: str = "scores"
    weights: str = "one"
    hold_share: bool = False

    def __post_init__(self) -> None:
        if self.dim < 1 or self.num_heads < 1 or self.dim % self.num_heads:
            raise UserError.of("--dim", self.dim, f"must be a positive multiple of the {self.num_heads} heads")
        for option, value in {"--blocks": self.num_blocks, "--window": self.window}.items():
            if value < 1:
                raise UserError.of(option, value, "allowed: 1 or more")
        for name, allowed in ROUTER_CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError.of(f"--{name}", getattr(self, name), f"allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class ReadNetworkConfig:
    """Shape of the network of gate "read" (`read_gate.py`): it reads the FFN input of layer `layer`, counted from 0, so
    after as many layers; `dim` is the width of its hidden layer."""

    layer: int
    dim: int

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError.of("--dim", self.dim, "allowed: 1 or more")

    def check(self, num_layers: int) -> None:
        """UserError for a model that has no layers before the one it reads, or none from there on."""
        if not 1 <= self.layer < num_layers:
            raise UserError.of("--read-layers", self.layer, f"allowed: 1 to {num_layers - 1}, of {num_layers} layers")


def rope_sets(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary settings of a parent's config: one dict, or one for each kind of layer (Gemma 3)."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]


class RoutedConfig(PretrainedConfig):
    """Config of a routed checkpoint; `text_config` is the parent's, so transformers' caches understand it.

    `layer_cuts`: one dict of `LayerCut` fields per layer. `routing` says who decides: "layerwise" (a gate per
    layer) or "path" (the path router, before the backbone). `path_router` is independent of it: a path router
    beside layerwise routing is a forecast only. `selection` says how scores choose experts: "top_k", a fixed number
    per token, or "threshold", as many as score high enough (0 to R); CMoE's representative gates know only "top_k".
    `token_power`: see `layers.weighted_mass`.
    `gate` "read": from the layer that `read_network` reads on, one network chooses for all; before it linear gates do.
    """

    model_type = "pregate"
    sub_configs = {"text_config": AutoConfig}  # pyright: ignore[reportAssignmentType] # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        layer_cuts: list[dict[str, int]] | None = None,
        routing: str = "layerwise",
        gate: str = "linear",
        selection: str = "top_k",
        token_power: float = 0.0,
        path_router: dict[str, Any] | None = None,
        read_network: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            parent = clean_fields(text_config)
            text_config = AutoConfig.for_model(parent.pop("model_type", "llama"), **parent)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.layer_cuts = layer_cuts or []
        self.routing = routing
        self.gate = gate
        self.selection = selection
        self.token_power = token_power
        self.path_router = path_router
        self.read_network = read_network
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.routing not in ROUTINGS:
            raise UserError.of("routing", self.routing, f"allowed: {', '.join(ROUTINGS)}")
        if self.gate not in GATES:
            raise UserError.of("gate", self.gate, f"allowed: {', '.join(GATES)}")
        if self.selection not in SELECTIONS:
            raise UserError.of("selection", self.selection, f"allowed: {', '.join(SELECTIONS)}")
        if self.selection == "threshold" and self.gate not in ("linear", "read"):
            raise UserError.of("selection", self.selection, f"allowed with gate {self.gate}: top_k")
        if self.routing == "path" and self.path_router is None:
            raise UserError("routing path: config has no path_router; a path checkpoint needs one")
        if (self.gate == "read") != (self.read_network is not None):
            raise UserError("gate read: config needs a read_network, and no other gate has one")
        if self.read_network is not None:
            self.read_shape.check(len(self.layer_cuts))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As transformers' own; who asks for a config may ask for its model next, so that class is registered here."""
        importlib.import_module("pregate.model.modeling")
        return super().from_dict(config_dict, **kwargs)

    @property
    def cuts(self) -> tuple[LayerCut, ...]:
        return tuple(LayerCut(**c) for c in self.layer_cuts)

    @property
    def has_path_router(self) -> bool:
        return self.path_router is not None

    @property
    def router_shape(self) -> PathRouterConfig:
        """Shape of the path router; ValueError when the checkpoint has none."""
        if self.path_router is None:
            raise UserError("this checkpoint has no path router; make one with `pregate decouple`")
        return PathRouterConfig(**self.path_router)

    @property
    def read_shape(self) -> ReadNetworkConfig:
        """Shape of the network of gate "read"; only a checkpoint with that gate has one."""
        assert self.read_network is not None
        return ReadNetworkConfig(**self.read_network)

    @property
    def hidden_act(self) -> str:
        """What the parent calls its FFN's activation; UserError when it does not say.

        Where both names are set (Gemma), `hidden_activation` is the one the model computes with.
        """
        for name in ("hidden_activation", "hidden_act"):
            if act := getattr(self.text_config, name, None):
                return act
        raise UserError(f"model family {self.text_config.model_type!r}: its config names no hidden_act")

    @property
    def context_tokens(self) -> int:
        """The longest sequence that can be served, in tokens.

        LongRoPE (Phi-3 128k) changes the rotation of every token of a forward pass once its longest sequence passes the
        length of pretraining; a text must not depend on its batch mates, so there the context ends at that length.
        """
        context = int(self.text_config.max_position_embeddings)
        for rope in rope_sets(self.text_config):
            if rope.get("rope_type") == "longrope":
                context = min(context, int(rope["original_max_position_embeddings"]))
        return context

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """Give transformers' caches and generation the parent's config."""
        return self.text_config


AutoConfig.register(RoutedConfig.model_type, RoutedConfig)

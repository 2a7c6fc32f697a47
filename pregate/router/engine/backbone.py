"""The backbone: a routed checkpoint without its routed experts, whose MLPs call the exchange and whose attention
reads our KV cache.

Shape letters: T tokens of a step, D hidden width, L layers, K experts per token, B rows whose logits are wanted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pregate.base.device import to_device
from pregate.base.memory import available_bytes
from pregate.model.layers import RoutedMLP, find_routed_mlps
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.attention import ATTENTION_NAME, register_attention, run_step
from pregate.router.engine.decoder_parts import lean_decoder
from pregate.router.engine.exchange import Exchange
from pregate.router.engine.family import check_family
from pregate.router.engine.probe import probe
from pregate.router.engine.step_layout import StepLayout


class ExchangeMLP(nn.Module):
    """One layer's FFN in the backbone: the exchange runs it, on what the paths or the layer's gate choose. Where a read
    network has just named the experts of later layers, hosts that fetch ahead are told."""

    def __init__(self, mlp: RoutedMLP, exchange: Exchange, exact: bool) -> None:
        super().__init__()
        self.mlp, self.exchange, self.exact = mlp, exchange, exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        choice = None if self.exact or not self.mlp.cut.num_active else self.mlp.gate.choose(x_TD)
        read = self.mlp.read_gate
        if read is not None and read.layer == read.network.config.layer and self.exchange.wants_lookahead:
            self.exchange.foretell({n: later.ids.cpu().numpy() for n, later in read.network.later().items()})
        return self.exchange.combine(self.exchange.dispatch(self.mlp.layer, x_TD, choice)).view_as(x)


class RoutedBackbone(RoutedForCausalLM):
    """`RoutedForCausalLM` without the routed experts: their weights are neither made nor read."""

    hold_experts = False
    _keys_to_ignore_on_load_unexpected = [r"\.experts\.(gate_up_proj|down_proj)$"]  # noqa: RUF012


class Backbone:
    """Runs one step over a batch laid out by `StepLayout`: as a lean decoder where the family's check allows it, else
    in transformers' own modules. `kv_shapes` are (heads, width) of every layer's keys and of its values."""

    def __init__(self, model: RoutedBackbone, exchange: Exchange, device: str, lean: bool) -> None:
        self.config, self.path_router, self.dtype = model.config, model.path_router, model.dtype
        self.exchange, self.device, self.lean = exchange, device, lean
        seen = probe(model.parent)
        self.kv_shapes = seen.kv_shapes
        exact = model.config.routing == "path"
        for name, mlp in find_routed_mlps(model.parent).items():
            if (shared := mlp.shared) is not None:
                exchange.hold_shared(mlp.layer, shared.gate_up_proj.detach(), shared.down_proj.detach())
                mlp.shared = None
            model.parent.set_submodule(name, ExchangeMLP(mlp, exchange, exact))
        #: Token ids [T], positions [T], the step's layout, rows [B] whose logits are wanted -> logits [B, V].
        self.run = lean_decoder(model.parent, seen).forward if lean else partial(run_step, model.parent)

    @classmethod
    def load(
        cls, path: str | Path, exchange: Exchange, dtype: str, device: str, parent: Path | None = None
    ) -> Backbone:
        """Load the checkpoint at `path` (CheckpointError when it is none) in `dtype` onto `device`; or what an adapter
        there makes of its `parent`.

        What is held are copies: transformers leaves a weight of the stored type mapped to its file, and whoever writes
        over the file would change what is served, or kill the process by cutting it.
        """
        register_attention()
        model: Any = RoutedBackbone.from_pretrained(path, parent=parent, dtype=getattr(torch, dtype))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.clone())  # not its `data`: a view keeps the mapping it is one of
        model.parent.set_attn_implementation(ATTENTION_NAME)
        return cls(model.to(device).eval(), exchange, device, check_family(model.config.text_config))

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the KV cache that one token takes."""
        return sum(heads * width for layer in self.kv_shapes for heads, width in layer) * self.dtype.itemsize

    def free_bytes(self) -> int:
        """Memory that is free where the cache will be."""
        on_device = torch.device(self.device).type == "cuda"
        return torch.cuda.mem_get_info(self.device)[0] if on_device else available_bytes()

    @torch.inference_mode()
    def forward(
        self, token_ids: np.ndarray, positions: np.ndarray, layout: StepLayout, wanted: list[int]
    ) -> torch.Tensor:
        """Run tokens [T] at `positions` [T]; return logits [B, V] of the rows `wanted`."""
        parts = (torch.from_numpy(token_ids), torch.from_numpy(positions), torch.tensor(wanted, dtype=torch.int64))
        ids_T, positions_T, wanted_B = (to_device(part, torch.device(self.device)) for part in parts)
        return self.run(ids_T, positions_T, layout, wanted_B)

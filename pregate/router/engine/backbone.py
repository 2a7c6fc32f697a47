"""The backbone: a routed checkpoint without its routed experts, whose MLPs call the exchange and whose attention
reads our KV cache.

Shape letters: T tokens of a step, D hidden width, L layers, K experts per token, B rows whose logits are wanted.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from pregate.kernels import expert_ffn
from pregate.kernels.contract import ExpertFFN
from pregate.kernels.tools.warm_up import warm_up_dense
from pregate.model.layers import RoutedMLP, RoutedSlot, SharedExpert, find_routed_slots
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine.attention import ATTENTION_NAME, register_attention
from pregate.router.engine.decoder_parts import lean_decoder
from pregate.router.engine.exchange import Exchange
from pregate.router.engine.family import check_family
from pregate.router.engine.probe import probe
from pregate.router.engine.step_layout import StepLayout
from pregate.workers.client.host_client import LocalLayers


class ExchangeMLP(nn.Module):
    """One layer's FFN in the backbone: routed rows go away, the shared expert runs meanwhile, answers are added."""

    def __init__(self, mlp: RoutedMLP, exchange: Exchange, exact: bool) -> None:
        super().__init__()
        self.mlp, self.exchange, self.exact = mlp, exchange, exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        if not self.mlp.cut.num_active:
            return self.mlp.shared_output(x_TD).view_as(x)
        if self.exact and self.exchange.local is not None:
            return self.exchange.local.run(self.mlp.layer, x_TD).view_as(x)
        ids_TK, weights_TK = (None, None) if self.exact else self.mlp.gate.choose(x_TD)
        receipt = self.exchange.dispatch(self.mlp.layer, x_TD, ids_TK, weights_TK)
        return self.exchange.combine(receipt, self.mlp.shared_output(x_TD)).view_as(x)


class SharedFFN(nn.Module):
    """A shared expert through the kernels' entry point; the weights are held as its implementation wants them."""

    def __init__(self, shared: SharedExpert, ffn: ExpertFFN) -> None:
        super().__init__()
        self.ffn, self.width = ffn, shared.down_proj.shape[1]
        self.weights = ffn.stack(shared.gate_up_proj[None], shared.down_proj[None])

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.ffn.dense(x_TD, self.weights)


class RoutedBackbone(RoutedForCausalLM):
    """`RoutedForCausalLM` without the routed experts: their weights are neither made nor read."""

    hold_experts = False
    _keys_to_ignore_on_load_unexpected = [r"\.experts\.(gate_up_proj|down_proj)$"]  # noqa: RUF012


class Backbone:
    """Runs one step over a batch laid out by `StepLayout`: as a lean decoder where the family's check allows it, else
    in transformers' own modules. `kv_shapes` are (heads, width) of every layer's keys and of its values."""

    def __init__(self, model: RoutedBackbone, exchange: Exchange, device: str, lean: bool) -> None:
        self.config, self.path_router, self.dtype = model.config, model.path_router, model.dtype
        self.exchange, self.device = exchange, device
        seen = probe(model.parent)
        self.kv_shapes = seen.kv_shapes
        exact = model.config.routing == "path"
        slots = find_routed_slots(model.parent)
        _place_shared(slots, model, torch.device(device), exchange.local if exact else None)
        mlps = [ExchangeMLP(slot.mlp, exchange, exact) for slot in slots]
        self._apart = {m.width: m for mlp in mlps for m in mlp.modules() if isinstance(m, SharedFFN) and m.ffn.compiles}
        for slot, mlp in zip(slots, mlps, strict=True):
            slot.replace(mlp)
        self._run = lean_decoder(model.parent, seen).forward if lean else partial(_run_parent, model.parent)

    @classmethod
    def load(cls, path: str | Path, exchange: Exchange, dtype: str, device: str) -> Backbone:
        """Load the checkpoint at `path` (CheckpointError when it is none) in `dtype` onto `device`.

        What is held are copies: transformers leaves a weight of the stored type mapped to its file, and whoever writes
        over the file would change what is served, or kill the process by cutting it.
        """
        register_attention()
        model: Any = RoutedBackbone.from_pretrained(path, dtype=getattr(torch, dtype))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        model.parent.set_attn_implementation(ATTENTION_NAME)
        return cls(model.to(device).eval(), exchange, device, check_family(model.config.text_config))

    @torch.inference_mode()
    def warm_up(self, step_tokens: int) -> int:
        """Compile the expert kernels of steps of up to `step_tokens` tokens; return the number of calls it took."""
        x_1D = torch.zeros(1, self.config.text_config.hidden_size, dtype=self.dtype, device=self.device)
        calls = sum(warm_up_dense(m.ffn, m.weights, x_1D, step_tokens) for m in self._apart.values())
        local = self.exchange.local
        weighted = self.path_router is not None and self.path_router.config.weights == "learned"
        return calls if local is None else calls + local.warm_up(x_1D, step_tokens, weighted=weighted)

    @torch.inference_mode()
    def forward(
        self, token_ids: np.ndarray, positions: np.ndarray, layout: StepLayout, wanted: list[int]
    ) -> torch.Tensor:
        """Run tokens [T] at `positions` [T]; return logits [B, V] of the rows `wanted`."""
        ids_T, positions_T = (torch.from_numpy(part).to(self.device) for part in (token_ids, positions))
        return self._run(ids_T, positions_T, layout, torch.tensor(wanted, dtype=torch.int64, device=self.device))


def _run_parent(
    parent: Any, ids_T: torch.Tensor, positions_T: torch.Tensor, layout: StepLayout, wanted_B: torch.Tensor
) -> torch.Tensor:
    output = parent(
        input_ids=ids_T[None],
        position_ids=positions_T[None],
        use_cache=False,
        logits_to_keep=wanted_B,
        pregate_step=layout,
    )
    return output.logits[0]


def _place_shared(
    slots: list[RoutedSlot], model: RoutedBackbone, device: torch.device, local: LocalLayers | None
) -> None:
    """Give the shared expert of each layer to `local` where it runs the layer and takes it in; run every other one
    through the one implementation chosen for this machine."""
    mlps = [slot.mlp for slot in slots if slot.mlp.shared is not None]
    if local is not None and local.takes_shared:
        for mlp in [mlp for mlp in mlps if mlp.cut.num_active]:
            shared = cast(SharedExpert, mlp.shared)
            local.take_shared(mlp.layer, shared.gate_up_proj.detach(), shared.down_proj.detach())
            mlp.shared = None
        mlps = [mlp for mlp in mlps if mlp.shared is not None]
    if not mlps:
        return
    widths = {width for mlp in mlps for width in (mlp.hidden_size, mlp.cut.shared_width)}
    ffn = expert_ffn.choose("auto", device, model.dtype, act=model.config.hidden_act, widths=widths)
    for mlp in mlps:
        # One at a time, so that packed weights and those they were made from are both held for one layer only.
        mlp.add_module("shared", SharedFFN(cast(SharedExpert, mlp.shared), ffn))
        if local is not None and mlp.cut.num_active:
            local.join_shared(mlp.layer, cast(SharedFFN, mlp.shared))

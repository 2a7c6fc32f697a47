"""The path router: a small causal network from token ids to every layer's experts (`path_computer.py` runs it).

Data on its way: token ids [B, N] -> own embedding [B, N, C] -> causal blocks over the last `window` tokens ->
scores [B, N, S], S the routed experts of all layers side by side -> top-k or threshold per layer -> `Paths`.
The heads that give the scores have one of three shapes (`path_heads.py`).

Shape letters: B sequences, N new tokens, P past tokens kept, C router width, H heads, W window, S sum of R_l,
L layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels.reference import threshold_for
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.dselect import code_scores
from pregate.model.gates import Choice
from pregate.model.path_heads import make_heads
from pregate.model.share_control import ShareControl

#: Scores are rounded to this many binary digits, so that experts tied in exact arithmetic stay tied whatever
#: the batch shape does to the last bits of float64; ties go to the lower id.
SCORE_BITS = 30
#: Scores are told apart up to this size, in units of 2 ** -SCORE_BITS: with an expert's id they fit 64 bits.
MAX_UNITS = 2.0**47
#: Texts are run through the router in pieces of this many tokens, which bounds its attention matrix.
CHUNK_TOKENS = 512

KeysValues = tuple[torch.Tensor, torch.Tensor]


class RouterBlock(nn.Module):
    """Attention over a window of tokens, biased by distance, and an FFN; [B, N, C] to the same."""

    def __init__(self, config: PathRouterConfig) -> None:
        super().__init__()
        self.num_heads, self.window = config.num_heads, config.window
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)
        #: Learned bias by distance: positions are relative, so state needs no absolute position.
        self.distance_bias = nn.Parameter(torch.zeros(config.num_heads, config.window))
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.up = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.down = nn.Linear(4 * config.dim, config.dim, bias=False)

    def forward(self, x_BNC: torch.Tensor, past: KeysValues | None, past_len_B: torch.Tensor) -> tuple:
        """Return (x [B, N, C], keys [B, P + N, C], values [B, P + N, C])."""
        q, k, v = self.qkv(self.attention_norm(x_BNC)).chunk(3, dim=-1)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=self._bias(q.shape[1], k.shape[1], past_len_B))
        x_BNC = x_BNC + self.output(mixed.transpose(1, 2).flatten(-2))
        return x_BNC + self.down(F.silu(self.up(self.mlp_norm(x_BNC)))), k, v

    def _bias(self, num_new: int, num_keys: int, past_len_B: torch.Tensor) -> torch.Tensor:
        """Bias [B, H, N, P + N]: learned by distance, -inf beyond the window, in the future, or before the past."""
        num_past = num_keys - num_new
        key = torch.arange(num_keys, device=past_len_B.device)
        distance = key[num_past:, None] - key[None, :]
        seen = (distance >= 0) & (distance < self.window)
        bias = self.distance_bias[:, distance.clamp(0, self.window - 1)].masked_fill(~seen, -torch.inf)
        absent = key[None, :] < (num_past - past_len_B)[:, None]
        return bias[None].masked_fill(absent[:, None, None, :], -torch.inf)


class PathRouter(nn.Module):
    """Scores of every layer's routed experts from token ids alone (after Read-ME, section 3.2: a decoupled router).

    With `selection` "threshold" a token visits every expert that scores its layer's of `thresholds` [L] or more.
    `scale` [S] is there with learned weights: see `expert_weights`; `share_control` with `hold_share` and thresholds.
    UserError where the heads do not fit the cuts.
    """

    thresholds: torch.Tensor

    def __init__(
        self, config: PathRouterConfig, vocab_size: int, cuts: Sequence[LayerCut], selection: str = "top_k"
    ) -> None:
        super().__init__()
        self.config, self.cuts, self.selection = config, tuple(cuts), selection
        self.embedding = nn.Embedding(vocab_size, config.dim)
        #: What the embedding's table was just made of, to be kept beside the checkpoint (`factors.py`).
        self.factors: dict[str, torch.Tensor] = {}
        self.blocks = nn.ModuleList(RouterBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.heads = make_heads(config, self.cuts, selection)
        if config.weights == "learned":
            self.scale = nn.Parameter(torch.zeros(sum(c.num_routed for c in self.cuts)))
        self.register_buffer("thresholds", torch.zeros(len(self.cuts)), persistent=selection == "threshold")
        holds = config.hold_share and selection == "threshold"
        self.share_control = ShareControl() if holds else None

    def forward(
        self, ids_BN: torch.Tensor, past: list[KeysValues] | None = None, past_len_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """Return scores [B, N, S] and each block's keys and values, past included (of several pieces the last one's).

        `past`: per block ([B, P, C], [B, P, C]), left-padded; `past_len_B` says how many of P are real.
        """
        x_BNC, kept = self.encode(ids_BN, past, past_len_B)
        return self.scores_of(self.heads(x_BNC)), kept

    def scores_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Scores [..., S] from what the heads give [..., O]: the same, or the logits of codes."""
        return code_scores(outputs, self.cuts, self.selection) if self.config.gate == "dselect" else outputs

    def encode(
        self, ids_BN: torch.Tensor, past: list[KeysValues] | None = None, past_len_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """Return what the heads read, [B, N, C], and keys and values; arguments as of `forward`.

        More than `CHUNK_TOKENS` are attended to in pieces of so many, each with the window before it; that is the same
        (gradients too), and what attention keeps for them grows with N and not with its square.
        """
        if past_len_B is None:
            past_len_B = torch.zeros(ids_BN.shape[0], dtype=torch.int64, device=ids_BN.device)
        parts, seen = [], past
        for ids in ids_BN.split(CHUNK_TOKENS, dim=1):
            if parts:
                seen, past_len_B = self._last_window(seen or [], past_len_B + CHUNK_TOKENS)
            x, seen = self._encode_piece(ids, seen, past_len_B)
            parts.append(x)
        return self.norm(torch.cat(parts, dim=1)), seen or []

    def _encode_piece(
        self, ids_BN: torch.Tensor, past: list[KeysValues] | None, past_len_B: torch.Tensor
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        x = self.embedding(ids_BN)
        kept: list[KeysValues] = []
        for index, block in enumerate(self.blocks):
            x, keys, values = block(x, None if past is None else past[index], past_len_B)
            kept.append((keys, values))
        return x, kept

    def _last_window(self, kept: list[KeysValues], past_len_B: torch.Tensor) -> tuple[list[KeysValues], torch.Tensor]:
        """Of keys and values what the next token can see, and how much of it is real."""
        num_keys = kept[0][0].shape[1]
        start = max(0, num_keys - (self.config.window - 1))
        return [(keys[:, start:], values[:, start:]) for keys, values in kept], past_len_B.clamp_max(num_keys - start)

    def expert_weights(self, scores_TS: torch.Tensor) -> torch.Tensor | None:
        """What each expert would weigh if it were chosen [T, S]; None when all weigh 1.

        1 + softmax(the layer's scores) * `scale`, as CMoE's gate (section 3.3). With scale 0, where it starts, the
        weights are 1 and are only given where gradients are asked for: there they have one.
        """
        if self.config.weights == "one":
            return None
        learns = torch.is_grad_enabled() and self.scale.requires_grad
        if not learns and not self.scale.any():
            return None
        places_LR = self.places.to(scores_TS.device)
        # Not -inf: a layer without experts has a softmax, too, and its gradient must not be NaN.
        shares_TLR = by_layer(scores_TS, places_LR, torch.finfo(scores_TS.dtype).min).softmax(dim=-1)
        return 1 + shares_TLR[:, places_LR < scores_TS.shape[-1]] * self.scale

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each layer's scores stand among those of all layers [L, R], R the most of any; S where it has fewer."""
        sizes_L = np.array([c.num_routed for c in self.cuts], dtype=np.int64)
        expert_R = np.arange(sizes_L.max(initial=0))
        first_L1 = (np.cumsum(sizes_L) - sizes_L)[:, None]
        return torch.from_numpy(np.where(expert_R < sizes_L[:, None], first_L1 + expert_R, sizes_L.sum()))


def by_layer(x_TS: torch.Tensor, places_LR: torch.Tensor, fill: float) -> torch.Tensor:
    """[T, L, R]: the values of every layer's experts (`PathRouter.places`), `fill` where a layer has fewer."""
    return F.pad(x_TS, (0, 1), value=fill)[:, places_LR]


def choose_experts(router: PathRouter, scores_NS: torch.Tensor, offset_N: torch.Tensor | None = None) -> Choice:
    """Ids [N, L, K] that scores [N, S] of `router` choose in every layer, and what they weigh (0 where the id is -1).

    The k highest, ties to the lower id, or those above the layer's threshold less the token's offset. Weights are of
    the rounded scores too, so that they are as stable as the choice; except where gradients are asked for, which
    rounding has none of.
    """
    places_LR = router.places.to(scores_NS.device)
    units_NS = torch.round(scores_NS * 2.0**SCORE_BITS)
    ids_NLK = _choose(router, by_layer(units_NS, places_LR, -torch.inf), places_LR == scores_NS.shape[-1], offset_N)
    if router.config.weights == "one":  # before the units are scores again: this is on every token's way
        return Choice(ids_NLK)
    weights_NS = router.expert_weights(scores_NS if scores_NS.requires_grad else units_NS / 2.0**SCORE_BITS)
    if weights_NS is None:
        return Choice(ids_NLK)
    weights_NLR = by_layer(weights_NS, places_LR, 0.0)
    return Choice(ids_NLK, weights_NLR.gather(-1, ids_NLK.clamp_min(0)) * (ids_NLK >= 0))


def _choose(
    router: PathRouter, units_NLR: torch.Tensor, absent_LR: torch.Tensor, offset_N: torch.Tensor | None
) -> torch.Tensor:
    """Ids [N, L, K] of every layer from its scores in units of 2 ** -SCORE_BITS."""
    num_routed = units_NLR.shape[-1]
    expert_R = torch.arange(num_routed, device=units_NLR.device)
    active_L1 = torch.tensor([c.num_active for c in router.cuts], device=units_NLR.device)[:, None]
    if router.selection == "top_k":
        num_active = max((c.num_active for c in router.cuts), default=0)
        # All unlike, so that the same are found whatever the order they are looked at in.
        keys_NLR = units_NLR.clamp(-MAX_UNITS, MAX_UNITS).long() * num_routed + (num_routed - 1 - expert_R)
        ids = keys_NLR.topk(num_active, dim=-1).indices
        ids = ids.masked_fill(expert_R[:num_active] >= active_L1, num_routed)
    else:
        limits_L1 = router.thresholds.to(units_NLR.dtype)[:, None]
        limits = limits_L1 if offset_N is None else limits_L1 - offset_N[:, None, None]
        absent = (units_NLR < torch.round(limits * 2.0**SCORE_BITS)) | absent_LR | (active_L1 == 0)
        ids = expert_R.expand_as(units_NLR).masked_fill(absent, num_routed)
    ids = ids.sort(dim=-1).values
    return ids.masked_fill(ids == num_routed, -1)


def split_layers(x_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> tuple[torch.Tensor, ...]:
    """Per layer [T, R]."""
    return x_TS.split([c.num_routed for c in cuts], dim=-1)


def margins(router: PathRouter, scores_TS: torch.Tensor) -> torch.Tensor:
    """How far each score lies above its layer's threshold [T, S], the scores rounded (`SCORE_BITS`); -inf in a layer
    that has no choice."""
    limits_L = router.thresholds.to(scores_TS.dtype)
    sizes_L = torch.tensor([c.num_routed for c in router.cuts], device=limits_L.device)
    chooses_L = torch.tensor([0 < c.num_active < c.num_routed for c in router.cuts], device=limits_L.device)
    limits_S = limits_L.masked_fill(~chooses_L, torch.inf).repeat_interleave(sizes_L, output_size=scores_TS.shape[-1])
    return torch.round(scores_TS * 2.0**SCORE_BITS) / 2.0**SCORE_BITS - limits_S


def layer_thresholds(cuts: Sequence[LayerCut], scores_TS: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
    """The thresholds [L] by which the layers' experts' mean numbers per token of `scores_TS` are `numbers`."""
    layers = zip(cuts, split_layers(scores_TS, cuts), numbers, strict=True)
    infinite = scores_TS.new_full((), torch.inf)
    return torch.stack([threshold_for(x_TR, number) if cut.num_routed else infinite for cut, x_TR, number in layers])


@torch.no_grad()
def put_thresholds(router: PathRouter, scores_TS: torch.Tensor, numbers: Sequence[float]) -> None:
    """Set each layer's threshold so that its experts' mean number per token of `scores_TS` is that of `numbers`."""
    router.thresholds.copy_(layer_thresholds(router.cuts, scores_TS, numbers))
    if router.share_control is not None:
        margins_TS = margins(router, scores_TS.double())
        router.share_control.calibrate(margins_TS, float((margins_TS >= 0).sum()) / len(margins_TS))

"""The path router: a small causal network from token ids to every layer's experts, and its incremental state.

Data on its way: token ids [B, N] -> own embedding [B, N, C] -> causal blocks over the last `window` tokens ->
scores [B, N, S], S the routed experts of all layers side by side -> top-k or threshold per layer -> `Paths`.
The heads that give the scores have one of three shapes (`path_heads.py`).

Shape letters: B sequences, N new tokens, P past tokens kept, C router width, H heads, W window, S sum of R_l,
L layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pregate.kernels.reference import above, threshold_for, top_k
from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.dselect import code_scores
from pregate.model.gates import Choice
from pregate.model.path_heads import make_heads
from pregate.model.paths import Paths

#: Scores are rounded to this many binary digits, so that experts tied in exact arithmetic stay tied whatever
#: the batch shape does to the last bits of float64; ties go to the lower id.
SCORE_BITS = 30
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
    `scale` [S] is there with learned weights: see `expert_weights`. UserError where the heads do not fit the cuts.
    """

    thresholds: torch.Tensor

    def __init__(
        self, config: PathRouterConfig, vocab_size: int, cuts: Sequence[LayerCut], selection: str = "top_k"
    ) -> None:
        super().__init__()
        self.config, self.cuts, self.selection = config, tuple(cuts), selection
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(RouterBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.heads = make_heads(config, self.cuts, selection)
        if config.weights == "learned":
            self.scale = nn.Parameter(torch.zeros(sum(c.num_routed for c in self.cuts)))
        self.register_buffer("thresholds", torch.zeros(len(self.cuts)), persistent=selection == "threshold")

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
        layers = scores_TS.split([c.num_routed for c in self.cuts], dim=-1)
        return 1 + torch.cat([scores.softmax(dim=-1) for scores in layers], dim=-1) * self.scale


@dataclass(frozen=True)
class PathState:
    """What the router remembers of one sequence: keys and values [num_blocks, P, C] of its last W - 1 tokens."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        return self.keys.shape[1]


class PathComputer:
    """Runs a path router incrementally over many sequences; the same paths whole, in chunks, or token by token.

    It computes in float64 on a copy of the weights: sums in another order then differ by about 1e-15, so batch
    mates cannot move a choice (see `SCORE_BITS`).
    """

    def __init__(self, router: PathRouter) -> None:
        self.cuts, self.config = router.cuts, router.config
        self.device = router.embedding.weight.device
        copy = PathRouter(router.config, router.embedding.num_embeddings, router.cuts, router.selection)
        self._router = copy.to(self.device, torch.float64)
        self._router.load_state_dict({k: v.double() for k, v in router.state_dict().items()})
        self._router.requires_grad_(False)

    def new_state(self) -> PathState:
        """State of a sequence nothing of which has been seen."""
        empty = torch.zeros(self.config.num_blocks, 0, self.config.dim, dtype=torch.float64, device=self.device)
        return PathState(empty, empty)

    def extend(
        self, states: Sequence[PathState], new_ids: Sequence[Sequence[int]]
    ) -> tuple[list[Paths], list[PathState]]:
        """Extend each sequence by its own number of new ids; return their paths [n_i, L, k_max] and new states."""
        parts: list[list[Paths]] = [[] for _ in states]
        states = list(states)
        longest = max((len(ids) for ids in new_ids), default=0)
        for start in range(0, longest, CHUNK_TOKENS):
            live = [i for i, ids in enumerate(new_ids) if len(ids) > start]
            pieces = [list(new_ids[i][start : start + CHUNK_TOKENS]) for i in live]
            paths, after = self._extend_chunk([states[i] for i in live], pieces)
            for i, path, state in zip(live, paths, after, strict=True):
                parts[i].append(path)
                states[i] = state
        return [Paths.concatenate(p) if p else self._no_paths() for p in parts], states

    def _no_paths(self) -> Paths:
        """Those of no tokens: with weights where other paths have them."""
        num_scores = sum(c.num_routed for c in self.cuts)
        return self._paths(torch.empty(0, num_scores, dtype=torch.float64, device=self.device))

    @property
    def _k_max(self) -> int:
        by_threshold = self._router.selection == "threshold"
        return max((c.num_routed if by_threshold else c.num_active for c in self.cuts), default=0)

    @torch.no_grad()
    def _extend_chunk(
        self, states: Sequence[PathState], pieces: Sequence[list[int]]
    ) -> tuple[list[Paths], list[PathState]]:
        lengths = [len(p) for p in pieces]
        assert max(lengths) <= CHUNK_TOKENS  # of more, `forward` returns the last keys alone
        ids_BN = torch.zeros(len(pieces), max(lengths), dtype=torch.int64, device=self.device)
        for row, piece in zip(ids_BN, pieces, strict=True):
            row[: len(piece)] = torch.tensor(piece, device=self.device)
        past, past_len_B = self._stack(states)
        scores_BNS, kept = self._router(ids_BN, past, past_len_B)
        num_past = past_len_B.max().item() if len(states) else 0
        after = [self._keep(kept, b, int(num_past), states[b].length, n) for b, n in enumerate(lengths)]
        return [self._paths(scores_BNS[b, :n]) for b, n in enumerate(lengths)], after

    def _stack(self, states: Sequence[PathState]) -> tuple[list[KeysValues], torch.Tensor]:
        longest = max(s.length for s in states)
        padded = [
            torch.stack([F.pad(t, (0, 0, longest - t.shape[1], 0)) for t in side])
            for side in ([s.keys for s in states], [s.values for s in states])
        ]
        past = [(padded[0][:, i], padded[1][:, i]) for i in range(self.config.num_blocks)]
        return past, torch.tensor([s.length for s in states], device=self.device)

    def _keep(self, kept: list[KeysValues], row: int, num_past: int, past_len: int, num_new: int) -> PathState:
        stop = num_past + num_new
        start = max(num_past - past_len, stop - (self.config.window - 1))
        keys, values = zip(*((k[row, start:stop], v[row, start:stop]) for k, v in kept), strict=True)
        return PathState(torch.stack(keys), torch.stack(values))

    def _paths(self, scores_NS: torch.Tensor) -> Paths:
        choices = choose_experts(self._router, scores_NS)
        shape = (scores_NS.shape[0], len(self.cuts), self._k_max)
        ids = np.full(shape, -1, dtype=np.int16)
        weighted = any(chosen.weights is not None for chosen in choices)
        weights = np.zeros(shape, dtype=np.float32) if weighted else None
        for layer, chosen in enumerate(choices):
            width = chosen.ids.shape[1]
            ids[:, layer, :width] = chosen.ids.cpu().numpy()
            if weights is not None and chosen.weights is not None:
                weights[:, layer, :width] = chosen.weights.cpu().numpy()
        return Paths(ids, weights)


def choose_experts(router: PathRouter, scores_NS: torch.Tensor) -> list[Choice]:
    """Per layer the ids [N, K] that scores [N, S] of `router` choose, and what they weigh (0 where the id is -1).

    The k highest, or those above the layer's threshold. Weights are of the rounded scores too, so that they are as
    stable as the choice; except where gradients are asked for, which rounding has none of.
    """
    sizes = [c.num_routed for c in router.cuts]
    units_NS = torch.round(scores_NS * 2.0**SCORE_BITS)
    chosen = _choose(router, units_NS.split(sizes, dim=-1))
    if router.config.weights == "one":  # before the units are scores again: this is on every token's way
        return [Choice(ids) for ids in chosen]
    weights_NS = router.expert_weights(scores_NS if scores_NS.requires_grad else units_NS / 2.0**SCORE_BITS)
    if weights_NS is None:
        return [Choice(ids) for ids in chosen]
    layers = zip(chosen, weights_NS.split(sizes, dim=-1), strict=True)
    return [Choice(ids, weights.gather(-1, ids.clamp_min(0)) * (ids >= 0)) for ids, weights in layers]


def _choose(router: PathRouter, units: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Ids [N, K] of every layer from its scores in units of 2 ** -SCORE_BITS [N, R]."""
    if router.selection == "top_k":
        return [top_k(scores, cut.num_active) for scores, cut in zip(units, router.cuts, strict=True)]
    limits_L = torch.round(router.thresholds.to(units[0].dtype) * 2.0**SCORE_BITS)
    chosen = [above(scores, limit) for scores, limit in zip(units, limits_L, strict=True)]
    return [ids if cut.num_active else ids[:, :0] for ids, cut in zip(chosen, router.cuts, strict=True)]


def split_layers(x_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> tuple[torch.Tensor, ...]:
    """Per layer [T, R]."""
    return x_TS.split([c.num_routed for c in cuts], dim=-1)


@torch.no_grad()
def put_thresholds(router: PathRouter, scores_TS: torch.Tensor, numbers: Sequence[float]) -> None:
    """Set each layer's threshold so that its experts' mean number per token of `scores_TS` is that of `numbers`."""
    layers = zip(router.cuts, split_layers(scores_TS, router.cuts), numbers, strict=True)
    for layer, (cut, scores_TR, number) in enumerate(layers):
        router.thresholds[layer] = threshold_for(scores_TR, number) if cut.num_routed else torch.inf

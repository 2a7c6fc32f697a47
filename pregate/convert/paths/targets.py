"""What a path router learns from, per token along the layer-wise model: each expert's contribution mass, or, for a
forecast, what its gate ranks it by.

Shape letters: B documents of a batch, N tokens of one, T tokens (padding included), D hidden width, R routed
experts of a layer, S the experts of all layers side by side, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file

from pregate.convert.files.partial import PartialCheckpoint
from pregate.convert.paths.all_experts import add_weighted, expert_weights, masses, routed_hidden
from pregate.convert.progress import Advance, Progress
from pregate.convert.text.batches import batches, padded
from pregate.model.config import LayerCut
from pregate.model.gates import LinearGate
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import split_layers

#: Added to a token's spread of standardised masses before they are divided by it.
LEAST_SPREAD = 0.05
#: One document in this many is kept back from training to measure on.
HELD_BACK_EVERY = 20
#: Tokens after which the targets found are kept.
PIECE_TOKENS = 16_384


@dataclass(frozen=True)
class TargetPool:
    """Documents and the masses seen on them: `rows[i]` ids, `mass[i]` float32 [len(rows[i]), S]; where a layer is read,
    `states[i]` bfloat16 [len(rows[i]), D] that layer's FFN input, and everything else is of the layers from it on.

    With selection by threshold the experts to be chosen are those whose mass reaches their layer's of `limits`, and a
    router is to choose `mean_active` of each layer per token.
    """

    rows: list[list[int]]
    mass: list[torch.Tensor]
    limits: tuple[torch.Tensor, ...]
    mean_active: tuple[float, ...]
    states: list[torch.Tensor] | None = None

    @property
    def inputs(self) -> list[Any]:
        """What is learned from, document by document: ids, or states."""
        return self.rows if self.states is None else self.states

    def held_back(self) -> TargetPool:
        """The documents that are measured on."""
        return self._only(range(0, len(self.rows), HELD_BACK_EVERY))

    def training(self) -> TargetPool:
        """The others."""
        return self._only([i for i in range(len(self.rows)) if i % HELD_BACK_EVERY])

    def _only(self, kept: Sequence[int]) -> TargetPool:
        rows, mass = ([those[i] for i in kept] for those in (self.rows, self.mass))
        states = None if self.states is None else [self.states[i] for i in kept]
        return replace(self, rows=rows, mass=mass, states=states)


@dataclass(frozen=True)
class MassScale:
    """Standard deviation and mean of each layer's masses over tokens and experts, [L]: brings layers to one scale."""

    std_L: torch.Tensor
    mean_L: torch.Tensor

    @classmethod
    def of(cls, mass_TS: torch.Tensor, cuts: Sequence[LayerCut]) -> MassScale:
        layers = [x.double() if x.numel() else torch.zeros(2, dtype=torch.float64) for x in split_layers(mass_TS, cuts)]
        stds = torch.stack([x.std() for x in layers]).clamp_min(1e-12)
        return cls(stds.float(), torch.stack([x.mean() for x in layers]).float())

    def targets(self, mass_TS: torch.Tensor, cuts: Sequence[LayerCut], selection: str) -> torch.Tensor:
        """What the router regresses, float32 [T, S].

        With selection by threshold, masses in units of their layer's standard deviation: how much an expert would
        contribute counts, not only its rank. With a fixed number, they are then centred within each token and layer:
        only the order of a layer's experts decides, and a common rise of all of them is nothing to learn. Each
        token's masses are divided by their own spread, so that a few tokens of huge mass do not rule the squared
        error. (The latter measured on stories3M S3A3E8 cut by the recipe "plain", 1000 steps, held-out perplexity:
        standardised only 11.71 with one seed; means of four seeds: centred 11.53, as here 11.46; a seed moves it by
        0.05.)
        """
        parts = []
        for x, std, mean in zip(split_layers(mass_TS, cuts), self.std_L, self.mean_L, strict=True):
            if selection == "threshold":
                parts.append((x - mean) / std)
                continue
            centred = (x - x.mean(dim=-1, keepdim=True)) / std
            spread = centred.std(dim=-1, keepdim=True) if centred.shape[-1] > 1 else centred.abs()
            parts.append(centred / (spread + LEAST_SPREAD))
        return torch.cat(parts, dim=-1)


class _Recorder:
    """A `FastPath` that routes by the gate and keeps every layer's masses, or rankings; lives for one forward pass.

    All experts are computed, once: masses need them all, and the output is that of the chosen ones. Of the layer
    `read_layer`, if there is one, it keeps the input too, and nothing of those before.
    """

    def __init__(self, of_gates: bool, read_layer: int | None) -> None:
        self._of_gates, self._read_layer = of_gates, read_layer
        self._seen_TR: dict[int, torch.Tensor] = {}
        self._state_TD: torch.Tensor | None = None

    def side_by_side(self, cuts: Sequence[LayerCut], num_tokens: int) -> torch.Tensor:
        """What was seen of all layers side by side, then the state; a layer without routed experts has no column."""
        parts = [self._seen_TR.get(n, torch.zeros(num_tokens, cut.num_routed)) for n, cut in enumerate(cuts)]
        parts = parts[self._read_layer :] + ([] if self._state_TD is None else [self._state_TD])
        return torch.cat([p.cpu() for p in parts], dim=-1)

    def forward(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> torch.Tensor:
        if mlp.layer == self._read_layer:
            self._state_TD = x_TD
        out_TD = mlp.shared_output(x_TD)
        if mlp.experts is None:
            return out_TD
        h_TRM, down = routed_hidden(mlp, x_TD), mlp.experts.down_proj
        seen_TR = mlp.gate.ranking(x_TD) if self._of_gates else masses(h_TRM, down, mlp.token_power)
        self._seen_TR[mlp.layer] = seen_TR
        return add_weighted(out_TD, h_TRM, expert_weights(mlp.gate.choose(x_TD), mlp.cut.num_routed), down)


def by_row(
    rows: Sequence[list[int]],
    progress: Progress,
    run: Callable[[torch.Tensor], torch.Tensor],
    partial: PartialCheckpoint | None = None,
) -> list[torch.Tensor]:
    """Per document what `run` gives for its tokens [N, S], padding left out.

    `run` gets the ids [B, N] of a batch, padded on the right, and gives [B * N, S], on the CPU. What is found is kept
    in `partial` a piece at a time, and what an interrupted run kept there is read.
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with progress.stage("collecting targets", len(rows)) as advance:
        for number, piece in enumerate(_pieces(rows)):
            here = [index for batch in piece for index in batch]
            path = None if partial is None else partial.folder / f"targets-{number:05d}.safetensors"
            if path is not None and path.exists():
                parts = load_file(path)["mass"].split([len(rows[index]) for index in here])
                advance(len(here))
            else:
                parts = [part for batch in piece for part in _run(run, [rows[i] for i in batch], advance)]
                if partial is not None and path is not None:
                    partial.keep(path, {"mass": torch.cat(parts)})
                    partial.layer_done({}, {}, partial.state.layers_done + len(here))
            for index, part in zip(here, parts, strict=True):
                found[index] = part
    return found


def _pieces(rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """The batches of `rows` in groups of `PIECE_TOKENS` or a little more, padding included."""
    pieces: list[list[list[int]]] = []
    tokens = PIECE_TOKENS
    for batch in batches(rows):
        if tokens >= PIECE_TOKENS:
            pieces.append([])
            tokens = 0
        pieces[-1].append(batch)
        tokens += len(batch) * len(rows[batch[0]])
    return pieces


def _run(
    run: Callable[[torch.Tensor], torch.Tensor], rows: Sequence[list[int]], advance: Advance
) -> list[torch.Tensor]:
    ids_BN, _ = padded(rows)
    found_BNS = run(ids_BN).unflatten(0, tuple(ids_BN.shape))
    advance(len(rows))
    return [found_NS[: len(row)].clone() for row, found_NS in zip(rows, found_BNS, strict=True)]


@torch.no_grad()
def collect_targets(
    model: RoutedForCausalLM,
    rows: Sequence[list[int]],
    progress: Progress,
    of_gates: bool = False,
    partial: PartialCheckpoint | None = None,
    read_layer: int | None = None,
) -> TargetPool:
    """Run the layer-wise model over `rows` and keep every routed expert's contribution mass at every token.

    `of_gates`: keep what the gates rank the experts by in its place, and how many they choose. What an interrupted run
    has kept in `partial` is not computed again.
    `read_layer`: of the layers from it on alone, and with its FFN input as states.
    """

    def run(ids_BN: torch.Tensor) -> torch.Tensor:
        recorder = _Recorder(of_gates, read_layer)
        for mlp in model.routed_mlps:
            mlp.fast = recorder  # set here and not by the model's forward, which would compute the head as well
        # Without a mask: padding is on the right, where nothing before it looks.
        model.parent.base_model(input_ids=ids_BN.to(model.device), use_cache=False)
        return recorder.side_by_side(model.config.cuts, ids_BN.numel())

    mass = by_row(rows, progress, run, partial)
    states = None if read_layer is None else _split_off(mass, sum(c.num_routed for c in model.config.cuts[read_layer:]))
    limits = [torch.tensor(torch.inf)] * len(model.config.cuts)
    for mlp in model.routed_mlps:
        if mlp.experts is not None:
            limit = mlp.gate.threshold if of_gates and isinstance(mlp.gate, LinearGate) else mlp.mass_threshold
            limits[mlp.layer] = limit.detach().cpu()
    numbers = tuple(float(c.num_active) for c in model.config.cuts)
    if of_gates and model.config.selection == "threshold":
        layers = zip(split_layers(torch.cat(mass), model.config.cuts), limits, strict=True)
        numbers = tuple(float((x >= limit).sum() / len(x)) for x, limit in layers)
    return TargetPool(list(rows), mass, tuple(limits[read_layer:]), numbers[read_layer:], states)


def _split_off(found: list[torch.Tensor], width: int) -> list[torch.Tensor]:
    """Cut each [N, S + D] of `found` down to its first `width` columns, in place; returns the rest, bfloat16 [N, D]."""
    states = []
    for index, each in enumerate(found):
        states.append(each[:, width:].bfloat16())
        found[index] = each[:, :width].clone()
    return states

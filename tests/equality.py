"""What "equal to the reference" means, in one place (design: contracts, reference model and equality).

Floating-point sums in another order differ in the last bits. So: while the served text follows the reference's own
text, every logit is within `LOGIT_TOLERANCE` and every path equal; they may part only at a position where the
reference's own margin (its top two logits, of a text that is drawn the top two scores of the draw, or how far a layer's
gate scores are from another choice) is below `MIN_MARGIN`.
Such a position is excused, and comparison of that text ends there. Excused positions are counted and bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch.nn.functional import pad

from pregate.model.gates import Choice
from pregate.model.layers import RoutedMLP
from pregate.model.modeling import RoutedForCausalLM

LOGIT_TOLERANCE = 1e-3
MIN_MARGIN = 1e-3
MAX_EXCUSED_SHARE = 1 / 5000


@dataclass
class ReferenceText:
    """One prompt's text by the reference model.

    `logits` [N, V] and `margin` [N] per generated position; `paths` int64 [N_all - 1, L, K] and `path_margin`
    [N_all - 1, L] per input token (the last generated token is never an input).
    """

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    margin: torch.Tensor
    paths: torch.Tensor
    path_margin: torch.Tensor


class _RecordingGates:
    """The layer gates' choices, with the margin between the k-th and the next score."""

    def __init__(self, num_layers: int) -> None:
        self.ids: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self.margins: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        choice = mlp.gate.choose(x_TD)
        self.ids[mlp.layer].append(choice.ids)
        self.margins[mlp.layer].append(mlp.gate.margin(x_TD))
        return choice

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        layers = [torch.cat(layer) for layer in self.ids]
        widest = max(ids_TK.shape[1] for ids_TK in layers)
        ids = torch.stack([pad(ids_TK, (0, widest - ids_TK.shape[1]), value=-1) for ids_TK in layers], dim=1)
        return ids, torch.stack([torch.cat(layer) for layer in self.margins], dim=1)


#: Given the logits [V] of a position, the scores [V] of which the highest is picked.
Scores: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]


def _as_they_are(logits_V: torch.Tensor, position: int) -> torch.Tensor:
    return logits_V


@torch.inference_mode()
def reference_text(
    model: RoutedForCausalLM,
    prompt: Sequence[int],
    max_tokens: int,
    scores: Scores = _as_they_are,
) -> ReferenceText:
    """Generate with the reference model in one process, keeping logits, paths and margins.

    The token at `position` is the one of the highest `scores(logits_V, position)`, and its margin that to the next:
    greedy, where these are the logits.
    """
    exact = model.config.routing == "path"
    gates = _RecordingGates(len(model.config.cuts))
    if not exact:
        model.routing_policy = gates
    ids, cache, tokens, logits, margin = torch.tensor([list(prompt)]), None, [], [], []
    for _ in range(max_tokens):
        output = model(ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1])
        of_token_V = scores(logits[-1], len(prompt) + len(tokens))
        tokens.append(int(of_token_V.argmax()))
        first, second = of_token_V.topk(2).values
        margin.append(first - second)
        ids = torch.tensor([[tokens[-1]]])
    model.routing_policy = None
    if exact:
        paths = torch.from_numpy(model.paths([*prompt, *tokens[:-1]]).ids.astype(np.int64))
        path_margin = torch.full(paths.shape[:2], torch.inf)
    else:
        paths, path_margin = gates.stacked()
    return ReferenceText(list(prompt), tokens, torch.stack(logits), torch.stack(margin), paths, path_margin)


def refuse_degenerate(texts: Sequence[ReferenceText]) -> None:
    """ValueError unless the texts differ from each other and none just repeats itself: else equality shows little."""
    if len({tuple(t.tokens) for t in texts}) != len(texts):
        raise ValueError("equality: some prompts give the same text; choose others")
    for text in texts:
        if len(set(text.tokens)) < max(2, len(text.tokens) // 8):
            raise ValueError(
                f"equality: a text of {len(text.tokens)} tokens has {len(set(text.tokens))} different ones"
            )


def reference_texts(
    model: RoutedForCausalLM, prompts: Sequence[Sequence[int]], max_tokens: int, scores: Scores = _as_they_are
) -> list[ReferenceText]:
    """The text of every prompt; ValueError where they would show little."""
    texts = [reference_text(model, prompt, max_tokens, scores) for prompt in prompts]
    refuse_degenerate(texts)
    return texts


@dataclass
class Tally:
    """Positions compared and excused over a whole run of comparisons; `problems` are real differences."""

    compared: int = 0
    excused: int = 0
    max_logit_difference: float = 0.0
    problems: list[str] = field(default_factory=list)

    def compare_text(self, name: str, reference: ReferenceText, served: Sequence[int]) -> int:
        """Compare token ids; returns how many leading positions agree."""
        for position, (ours, theirs) in enumerate(zip(reference.tokens, served, strict=False)):
            if ours != theirs:
                self._differ(f"{name}: token {position} is {theirs}, reference {ours}", reference.margin[position])
                return position
            self.compared += 1
        if len(served) != len(reference.tokens):
            self.problems.append(f"{name}: {len(served)} tokens, reference {len(reference.tokens)}")
        return len(reference.tokens)

    def compare_logits(self, name: str, reference: ReferenceText, served: torch.Tensor, upto: int) -> None:
        """Compare logits [N, V] of the first `upto` generated positions."""
        difference = (reference.logits[:upto] - served[:upto].float()).abs().amax(dim=-1)
        if upto:
            self.max_logit_difference = max(self.max_logit_difference, difference.max().item())
        for position in torch.nonzero(difference > LOGIT_TOLERANCE).flatten().tolist():
            self.problems.append(f"{name}: logits at {position} differ by {difference[position]:.2e}")

    def compare_paths(self, name: str, reference: ReferenceText, served: np.ndarray) -> int:
        """Compare paths [n, L, K] of the leading input tokens; returns how many tokens agree."""
        ours = reference.paths[: len(served)].numpy()
        wrong = (ours != served).any(axis=-1)
        for token in np.flatnonzero(wrong.any(axis=-1)):
            layer = int(np.flatnonzero(wrong[token])[0])
            self._differ(f"{name}: path of token {token}, layer {layer}", reference.path_margin[token, layer])
            return int(token)
        return len(served)

    def _differ(self, what: str, margin: torch.Tensor) -> None:
        if margin < MIN_MARGIN:
            self.excused += 1
        else:
            self.problems.append(f"{what} (margin {margin:.2e})")

    def check(self) -> None:
        """AssertionError when anything differed without excuse, or too much was excused."""
        assert not self.problems, "; ".join(self.problems[:5])
        assert self.compared, "nothing was compared"
        assert self.excused <= self.compared * MAX_EXCUSED_SHARE, f"{self.excused} of {self.compared} excused"

    def __str__(self) -> str:
        return (
            f"{self.compared} positions equal, {self.excused} excused,"
            f" largest logit difference {self.max_logit_difference:.1e}"
        )

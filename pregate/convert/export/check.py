"""How far an exported model is from the routed one it was made from: logits, perplexity, greedy text.

The exported folder is loaded as anyone would, by transformers' AutoModelForCausalLM.

Shape letters: B documents of a batch, N tokens, V vocabulary, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pregate.base.errors import PregateError
from pregate.convert.measure.scoring import Score, logits_in_pieces, routed_by, score_logits
from pregate.convert.progress import Progress
from pregate.convert.text.batches import batches, padded
from pregate.model.gates import Choice
from pregate.model.layers import RoutedMLP, RoutingPolicy

#: Greedy texts compared, their length, and the length of their prompts, in tokens.
NUM_PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 8, 48, 12


def load_stock(folder: Path) -> Any:
    """Load a stock folder as stored; PregateError when it lacks a tensor or has one too many (a mistake of ours)."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise PregateError(f"{folder}: {type(model).__name__} does not load what was written: {wrong[0]}")
    return model.eval()


@torch.no_grad()
def compare_logits(routed: Any, stock: Any, rows: Sequence[list[int]], progress: Progress) -> dict[str, Any]:
    """Difference of logits over all positions of `rows`, and both models' perplexity on them.

    A position's relative difference is its largest difference of a logit over its largest logit.
    """
    absolute, relative, same, before, after = [], [], 0, Score(0.0, 0), Score(0.0, 0)
    with progress.stage("comparing logits", len(rows)) as advance:
        for batch in batches(rows):
            ids_BN, mask_BN = (t.to(routed.device) for t in padded([rows[i] for i in batch]))
            pieces, at = (logits_in_pieces(model, ids_BN, mask_BN) for model in (routed, stock)), 0
            for ours, theirs in zip(*pieces, strict=True):
                here, ahead = slice(at, at + ours.shape[1]), slice(at, at + ours.shape[1] + 1)
                at, real = here.stop, mask_BN[:, here].bool()
                largest_P = (ours.float() - theirs.float()).abs().amax(dim=-1)[real]
                absolute.append(largest_P)
                relative.append(largest_P / ours.float().abs().amax(dim=-1)[real])
                same += int((ours.argmax(dim=-1) == theirs.argmax(dim=-1))[real].sum())
                before += score_logits(ours, ids_BN[:, ahead], mask_BN[:, ahead])
                after += score_logits(theirs, ids_BN[:, ahead], mask_BN[:, ahead])
            advance(len(batch))
    absolute_P, relative_P = torch.cat(absolute), torch.cat(relative)
    return {
        "num_positions": len(absolute_P),
        "largest_logit_difference": rounded(absolute_P.max().item()),
        "median_relative_difference": rounded(relative_P.median().item()),
        "largest_relative_difference": rounded(relative_P.max().item()),
        "same_top_token": round(same / len(absolute_P), 6),
        "routed_perplexity": round(before.perplexity, 5),
        "exported_perplexity": round(after.perplexity, 5),
        "perplexity_ratio": round(after.perplexity / before.perplexity, 6),
    }


@torch.no_grad()
def compare_texts(
    routed: Any, stock: Any, rows: Sequence[list[int]], context: int, progress: Progress
) -> dict[str, Any]:
    """Greedy texts after the beginnings of the first rows: how many are equal, and where the others part.

    Where they part, "margin" is by how much the routed model prefers its token to its second choice, and "gate_margin"
    the least by which a gate up to there preferred its last expert to the next: near 0, rounding chooses another one.
    """
    prompts = [row[: min(PROMPT_TOKENS, context // 2)] for row in rows[:NUM_PROMPTS]]
    parted = []
    with progress.stage("comparing texts", len(prompts)) as advance:
        for number, prompt in enumerate(prompts):
            if found := _parting(routed, stock, prompt, min(NEW_TOKENS, context - len(prompt))):
                parted.append({"prompt": number} | found)
            advance(1)
    return {"greedy_texts_equal": f"{len(prompts) - len(parted)} of {len(prompts)}", "greedy_texts_part": parted}


def _parting(routed: Any, stock: Any, prompt: list[int], new_tokens: int) -> dict[str, Any] | None:
    """Where the greedy texts after a prompt part, and by what margins; None: nowhere."""
    ours, theirs = (greedy(model, prompt, new_tokens) for model in (routed, stock))
    if ours == theirs:
        return None
    at, watched = first_difference(ours, theirs), _LeastMargin()
    with routed_by(routed, watched):
        logits = routed(torch.tensor([prompt + ours[:at]], device=routed.device), use_cache=False).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return {"token": at, "margin": rounded(first - second), "gate_margin": rounded(watched.margin)}


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Where two different texts part; where one goes on after the other, the length of the shorter.

    Example: [1, 2, 3] and [1, 4, 3] part at 1.
    """
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


class _LeastMargin(RoutingPolicy):
    """The gates decide; `margin` is the nearest any of them came to another choice."""

    def __init__(self) -> None:
        self.margin = math.inf

    def choose(self, mlp: RoutedMLP, x_TD: torch.Tensor) -> Choice:
        self.margin = min(self.margin, mlp.gate.margin(x_TD).min().item())
        return mlp.gate.choose(x_TD)


def rounded(value: float) -> float:
    """To four significant digits."""
    return float(f"{value:.4g}")


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The tokens `model` adds to a prompt."""
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens}
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()

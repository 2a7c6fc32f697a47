"""The path router's table of tokens in fewer bytes than as it is, and what that changes.

Shape letters: V vocabulary, D the parent's hidden width, C router width, T tokens, L layers, K experts of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pregate.convert.export.options import ExportOptions
from pregate.convert.measure.scored_text import ScoredText
from pregate.convert.measure.scoring import score_rows
from pregate.convert.progress import Progress
from pregate.model.adapter import Adapter
from pregate.model.factors import quantised
from pregate.model.folder import ModelFolder
from pregate.model.modeling import RoutedForCausalLM

#: Rows of random tokens compared where no text is given, and their length.
_RANDOM_ROWS, _RANDOM_TOKENS = 32, 128


def table_factors(kind: str, name: str, table_VC: torch.Tensor, parent_VD: torch.Tensor) -> dict[str, torch.Tensor]:
    """What stands for the table `name`: "int8" rows, or "projected": what the parent's table is to be multiplied by."""
    if kind == "int8":
        int8, scale = quantised(table_VC)
        return {f"{name}.int8": int8, f"{name}.scale": scale}
    return {f"{name}.{part}": tensor for part, tensor in fitted(table_VC, parent_VD).items()}


@torch.no_grad()
def fitted(table_VC: torch.Tensor, parent_VD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The projection of the parent's table that comes closest to the router's, in least squares."""
    parent = parent_VD.double()
    mean_D, scale = parent.mean(dim=0), 1 / parent.std()
    centred = (parent - mean_D) * scale
    gram = centred.T @ centred
    gram += torch.eye(len(gram), dtype=gram.dtype) * (1e-12 * gram.diagonal().mean())
    projection = torch.linalg.solve(gram, centred.T @ table_VC.double())
    return {"projection": projection.float().contiguous(), "mean": mean_D, "scale": scale}


def differences(folder: ModelFolder, adapter: Adapter, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """How paths (and with text perplexity) of what the adapter gives compare with the checkpoint's."""
    before = RoutedForCausalLM.from_pretrained(folder.path, dtype=torch.float32).eval()
    after = RoutedForCausalLM.from_pretrained(adapter.folder, parent=adapter.parent, dtype=torch.float32).eval()
    if options.text:
        rows = ScoredText.read(folder, options.text, options.max_tokens, 0, options.text_field).rows
    else:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(folder.vocab_size, (_RANDOM_ROWS, _RANDOM_TOKENS), generator=generator).tolist()
    same, total = 0, 0
    for row in rows:
        ours, theirs = (model.paths(row).ids for model in (before, after))
        width = max(ours.shape[-1], theirs.shape[-1])
        ours, theirs = (_wide(ids, width) for ids in (ours, theirs))
        same, total = same + int((ours == theirs).all(axis=-1).sum()), total + ours.shape[0] * ours.shape[1]
    text = " ".join(map(str, options.text)) or "random tokens"
    figures: dict[str, Any] = {"measured_on": text, "same_paths": round(same / total, 5)}
    if options.text:
        scores = [score_rows(model, rows, progress=progress).perplexity for model in (before, after)]
        figures |= {"checkpoint_perplexity": round(scores[0], 4), "adapter_perplexity": round(scores[1], 4)}
    return figures


def _wide(ids_TLK: np.ndarray, width: int) -> np.ndarray:
    return np.pad(ids_TLK, ((0, 0), (0, 0), (0, width - ids_TLK.shape[-1])), constant_values=-1)

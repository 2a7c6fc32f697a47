"""Path routers of every kind, with random weights, and ways to run them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from pregate.model.config import LayerCut, PathRouterConfig
from pregate.model.path_computer import PathComputer
from pregate.model.path_router import PathRouter, put_thresholds

UNLIKE = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(7, 1, 2, 8)]
ALIKE = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(5, 3, 3, 8)]


@dataclass(frozen=True)
class Kind:
    """One combination of a path router's options."""

    heads: str = "independent"
    gate: str = "scores"
    weights: str = "one"
    selection: str = "top_k"
    hold_share: bool = False

    def __str__(self) -> str:
        parts = (self.heads, self.gate, self.weights, self.selection, "held" * self.hold_share)
        return "-".join(filter(None, parts))

    @property
    def cuts(self) -> list[LayerCut]:
        return ALIKE if self.heads == "single" else UNLIKE

    @property
    def config(self) -> PathRouterConfig:
        return PathRouterConfig(16, 2, 4, 12, self.heads, self.gate, self.weights, self.hold_share)


KINDS = [
    Kind(*choice)
    for choice in product(
        ("independent", "recurrent", "single"), ("scores", "dselect"), ("one", "learned"), ("top_k", "threshold")
    )
]
KINDS += [replace(kind, hold_share=True) for kind in KINDS if kind.selection == "threshold" and kind.heads != "single"]


def random_router(kind: Kind) -> PathRouter:
    """A router with large random weights, and thresholds that about half of the scores reach."""
    torch.manual_seed(0)
    router = PathRouter(kind.config, 100, kind.cuts, kind.selection)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if kind.selection == "threshold":
        scores_NS = router(torch.tensor([prompt(60)]))[0][0].detach()
        put_thresholds(router, scores_NS, [c.num_routed / 2 for c in kind.cuts])
    return router


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 100, size=length).tolist()


def whole(computer: PathComputer, ids: list[int]) -> np.ndarray:
    return route(computer, ids)[0]


def route(computer: PathComputer, ids: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and weights of a sequence given whole."""
    paths = computer.extend([computer.new_state()], [ids])[0][0]
    return paths.ids, paths.weights


def in_chunks(computer: PathComputer, ids: list[int], size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The same given `size` tokens at a time."""
    state, parts = computer.new_state(), []
    for start in range(0, len(ids), size):
        (paths,), (state,) = computer.extend([state], [ids[start : start + size]])
        parts.append(paths)
    weights = [p.weights for p in parts if p.weights is not None]
    return np.concatenate([p.ids for p in parts]), np.concatenate(weights) if weights else None


def assert_same(one: tuple[np.ndarray, np.ndarray | None], other: tuple[np.ndarray, np.ndarray | None]) -> None:
    """Ids and weights equal to the last bit."""
    assert np.array_equal(one[0], other[0])
    if one[1] is None or other[1] is None:
        assert one[1] is other[1]
    else:
        assert np.array_equal(one[1], other[1])

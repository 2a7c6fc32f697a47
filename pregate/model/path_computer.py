"""The path router's runtime: many sequences extended at once, each from the state that it left.

Shape letters: B sequences, N new tokens, P past tokens kept, M keys and values of each block in turn, C router width,
W window, S experts of all layers side by side, L layers, K experts of a token, J offsets (`share_control.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pregate.model import path_router
from pregate.model.path_router import KeysValues, PathRouter, choose_experts, margins
from pregate.model.paths import Paths
from pregate.model.share_control import SHARES


@dataclass(frozen=True)
class PathState:
    """What the router remembers of one sequence: [P, 2 * num_blocks, C], of its last W - 1 tokens each block's keys and
    values in turn; and of all its tokens the sums of `ShareControl.counts`, int64 [J + 1] (none without it, [0])."""

    kept: torch.Tensor
    counts: torch.Tensor

    @property
    def length(self) -> int:
        return self.kept.shape[0]


class PathComputer:
    """Runs a path router incrementally over many sequences; the same paths whole, in chunks, or token by token.

    It computes in float64 on a copy of the weights: sums in another order then differ by about 1e-15, so batch
    mates cannot move a choice (see `SCORE_BITS`). All sequences and layers are handled by the same few calls.
    """

    def __init__(self, router: PathRouter) -> None:
        self.cuts, self.config = router.cuts, router.config
        self.device = router.embedding.weight.device
        copy = PathRouter(router.config, router.embedding.num_embeddings, router.cuts, router.selection)
        if router.share_control is None:  # whatever the config says: thresholds that are tried out are fixed
            copy.share_control = None
        self.router = copy.to(self.device, torch.float64)
        self.router.load_state_dict({k: v.double() for k, v in router.state_dict().items()})
        self.router.requires_grad_(False)

    def new_state(self) -> PathState:
        """State of a sequence nothing of which has been seen."""
        kept = torch.zeros(0, 2 * self.config.num_blocks, self.config.dim, dtype=torch.float64, device=self.device)
        return PathState(kept, torch.zeros(self.num_counts, dtype=torch.int64, device=self.device))

    @property
    def num_counts(self) -> int:
        """How many counts a state has."""
        return 0 if self.router.share_control is None else len(SHARES) + 1

    def extend(
        self, states: Sequence[PathState], new_ids: Sequence[Sequence[int]]
    ) -> tuple[list[Paths], list[PathState]]:
        """Extend each sequence by its own number of new ids; return their paths [n_i, L, k_max] and new states."""
        parts: list[list[Paths]] = [[] for _ in states]
        states = list(states)
        longest = max((len(ids) for ids in new_ids), default=0)
        for start in range(0, longest, path_router.CHUNK_TOKENS):
            live = [i for i, ids in enumerate(new_ids) if len(ids) > start]
            pieces = [new_ids[i][start : start + path_router.CHUNK_TOKENS] for i in live]
            paths, after = self._extend_chunk([states[i] for i in live], pieces)
            for i, path, state in zip(live, paths, after, strict=True):
                parts[i].append(path)
                states[i] = state
        return [Paths.concatenate(p) if p else self.no_paths() for p in parts], states

    def no_paths(self) -> Paths:
        """Those of no tokens: of as many columns as all others, with weights where they have them."""
        none = torch.empty(0, sum(c.num_routed for c in self.cuts), dtype=torch.float64, device=self.device)
        return self.paths_of(none, self.new_state().counts.expand(0, -1))

    @torch.no_grad()
    def _extend_chunk(
        self, states: Sequence[PathState], pieces: Sequence[Sequence[int]]
    ) -> tuple[list[Paths], list[PathState]]:
        new_B, past_B = np.array([len(p) for p in pieces]), np.array([s.length for s in states])
        num_new, num_past = new_B.max(), past_B.max()
        assert num_new <= path_router.CHUNK_TOKENS  # of more, `encode` returns the last keys alone
        ids_BN = np.zeros((len(pieces), num_new), dtype=np.int64)
        places = _runs(new_B)
        ids_BN[places] = np.fromiter(itertools.chain.from_iterable(pieces), np.int64, new_B.sum())
        past_BPMC = states[0].kept.new_zeros(len(states), num_past, *states[0].kept.shape[1:])
        past_BPMC[self._on_device(_runs(past_B, num_past - past_B))] = torch.cat([s.kept for s in states])
        past = list(zip(past_BPMC[:, :, 0::2].unbind(2), past_BPMC[:, :, 1::2].unbind(2), strict=True))
        x_BNC, kept = self.router.encode(torch.from_numpy(ids_BN).to(self.device), past, self._on_device([past_B])[0])
        scores_TS = self.router.scores_of(self.router.heads(x_BNC[self._on_device(places)]))
        seen_TJ1, counts = self._summed(states, scores_TS, places, new_B)
        paths = self.paths_of(scores_TS, seen_TJ1)
        ends, states = np.cumsum(new_B), self._keep(kept, past_B, new_B, counts)
        return [paths[end - n : end] for end, n in zip(ends, new_B, strict=True)], states

    def _summed(
        self,
        states: Sequence[PathState],
        scores_TS: torch.Tensor,
        places: tuple[np.ndarray, np.ndarray],
        new_B: np.ndarray,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Counts before every new token [T, J + 1], and each sequence's after its last."""
        if (control := self.router.share_control) is None:
            return states[0].counts.expand(len(scores_TS), 0), [state.counts for state in states]
        before_B1J1 = torch.stack([state.counts for state in states])[:, None]
        grid = before_B1J1.new_zeros(len(states), new_B.max(), before_B1J1.shape[-1])
        grid[self._on_device(places)] = control.counts(margins(self.router, scores_TS))
        sums = torch.cat([before_B1J1, grid], dim=1).cumsum(dim=1)
        return sums[self._on_device(places)], sums[:, -1].unbind()

    def _keep(
        self, kept: list[KeysValues], past_B: np.ndarray, new_B: np.ndarray, counts: Sequence[torch.Tensor]
    ) -> list[PathState]:
        """The states after a piece whose sequences had `past_B` tokens, left-padded, and got `new_B`, right-padded."""
        left_B = np.minimum(past_B + new_B, self.config.window - 1)
        places = self._on_device(_runs(left_B, past_B.max() + new_B - left_B))
        rows = torch.stack([t[places] for pair in kept for t in pair], dim=1)
        return [PathState(*state) for state in zip(rows.split(left_B.tolist()), counts, strict=True)]

    def _on_device(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(np.stack(arrays)).to(self.device))

    def paths_of(self, scores_NS: torch.Tensor, seen_NJ1: torch.Tensor) -> Paths:
        """The paths that scores choose, after tokens of which `seen_NJ1` are the summed counts."""
        control = self.router.share_control
        chosen = choose_experts(self.router, scores_NS, None if control is None else control.offset(seen_NJ1))
        weights = None if chosen.weights is None else chosen.weights.to(torch.float32).cpu().numpy()
        return Paths(chosen.ids.to(torch.int16).cpu().numpy(), weights)


def _runs(lengths_B: np.ndarray, first_B: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of runs of places, row b's from `first_B[b]`. Example: lengths [2, 1]: [0, 0, 1], [0, 1, 0]."""
    row = np.repeat(np.arange(len(lengths_B)), lengths_B)
    before_B = np.cumsum(lengths_B) - lengths_B
    return row, np.arange(len(row)) + (first_B - before_B)[row]

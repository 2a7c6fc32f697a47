"""Other ways to choose a step by path, for the simulation of `batching.py`: all fill the token budget, so that steps
are as large as those of first come, first served, and differ in who may fill it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pregate.router.engine.batching import Candidate, Choice, PathBatcher


class FullBatcher(PathBatcher):
    """Whoever shares the most units fills the budget."""

    def _around_s(self, num_tokens: int) -> float:
        return 1e6  # a step is dear: the largest is the cheapest of a token


class WindowBatcher(FullBatcher):
    """Of the longest here, twice as many as fit."""

    def choose(self, candidates: Sequence[Candidate], budget: int) -> Choice:
        return super().choose(candidates[: 2 * budget], budget)


class OldestBatcher(FullBatcher):
    """Half of the budget is for the longest here, the other half for those that share units with them."""

    def choose(self, candidates: Sequence[Candidate], budget: int) -> Choice:
        first = [candidate._replace(overdue=True) for candidate in candidates[: budget // 2]]
        return super().choose([*first, *candidates[budget // 2 :]], budget)


BATCHERS: Mapping[str, type[PathBatcher]] = MappingProxyType(
    {"path-full": FullBatcher, "path-window": WindowBatcher, "path-oldest": OldestBatcher}
)

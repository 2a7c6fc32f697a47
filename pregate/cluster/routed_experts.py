"""What placing needs of a checkpoint, read from its config.json alone: neither torch nor transformers is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pregate.base.errors import CheckpointError


@dataclass(frozen=True)
class RoutedExperts:
    """`num_routed` of each layer, 0 for a dense one; `one_index`: a token visits one number's experts everywhere.

    `exact_paths`: a path router decides, so that there is a path service.
    """

    num_routed: tuple[int, ...]
    one_index: bool
    exact_paths: bool = False


def read_routed_experts(model: str) -> RoutedExperts:
    """CheckpointError for a folder whose config.json is not a routed checkpoint's."""
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        num_routed = tuple(int(cut["num_routed"]) for cut in config["layer_cuts"])
        router = config.get("path_router") or {}
        return RoutedExperts(num_routed, router.get("heads") == "single", config.get("routing") == "path")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable config of a routed checkpoint ({error!r})") from error

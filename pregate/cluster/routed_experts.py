"""What placing needs of a checkpoint, read from its config.json and manifest.json: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pregate.base.errors import CheckpointError
from pregate.base.strict_json import parse_json
from pregate.cluster.config import ServeConfig
from pregate.cluster.placement import Placement, place


@dataclass(frozen=True)
class RoutedExperts:
    """`num_routed` of each layer, 0 for a dense one; `one_index`: a token visits one number's experts everywhere.

    `exact_paths`: a path router decides, so that there is a path service. `load_LR`: how many of a token's experts each
    is, on average, as measured when the paths were made; None where the manifest does not say.
    """

    num_routed: tuple[int, ...]
    one_index: bool
    exact_paths: bool = False
    load_LR: NDArray[np.float64] | None = None

    def placement(
        self,
        config: ServeConfig,
        num_hosts: int | None = None,
        load_LR: NDArray[np.float64] | None = None,
        nodes: Sequence[str] = (),
    ) -> Placement:
        """Where `config` puts them, on so many hosts where they are not its own number, by another load where one was
        measured; all in one process's hands without hosts. `nodes` [H]: where hosts are, if there are any. UserError
        where it cannot."""
        return place(
            self.num_routed,
            max(1, config.hosts) if num_hosts is None else num_hosts,
            config.placement,
            one_index=self.one_index,
            load_LR=self.load_LR if load_LR is None else load_LR,
            replicas=config.replicas,
            node_of_host=nodes or None,
        )


def read_routed_experts(model: str) -> RoutedExperts:
    """CheckpointError for a folder whose config.json is not a routed checkpoint's."""
    path = Path(model) / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
        num_routed = tuple(int(cut["num_routed"]) for cut in config["layer_cuts"])
        router = config.get("path_router") or {}
        one_index, exact_paths = router.get("heads") == "single", config.get("routing") == "path"
        path = Path(model) / "manifest.json"
        figures = parse_json(path.read_text(encoding="utf-8-sig"))["figures"]
        load_LR = _load(figures, num_routed) if exact_paths else None
        return RoutedExperts(num_routed, one_index, exact_paths, load_LR)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable file of a routed checkpoint ({error!r})") from error


def _load(figures: dict[str, Any], num_routed: tuple[int, ...]) -> NDArray[np.float64] | None:
    """What `decouple` measured of the paths it made (`path_expert_use`)."""
    use = figures.get("decouple", {}).get("path_expert_use")
    if use is None:
        return None
    if [len(layer) for layer in use] != list(num_routed):
        raise ValueError("path_expert_use is not of these layers")
    load_LR = np.zeros((len(use), max(num_routed, default=0)))
    for layer, shares in enumerate(use):
        load_LR[layer, : len(shares)] = shares
    if not (load_LR >= 0).all():
        raise ValueError("path_expert_use has other values than shares")
    return load_LR

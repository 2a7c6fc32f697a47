"""`connect_service`: what a front door answers from, over the engines and the path service of a deployment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from pregate.router.link.engines import OPTIONS, Engines
from pregate.router.link.path_client import PathClient


def connect_service(
    engine_endpoints: Sequence[str], path_endpoint: str | None, tokenizer_dir: str | Path, model_name: str
) -> DoorService:
    """A service over the engines and the path service (None: there is none) at these endpoints."""
    paths = None if path_endpoint is None else PathClient(path_endpoint)
    if len(engine_endpoints) == 1:
        return DoorService(EngineClient(engine_endpoints[0]), tokenizer_dir, model_name, path_client=paths)
    engines = [EngineClient(e, options=OPTIONS, name=f"engine {n}") for n, e in enumerate(engine_endpoints)]
    return DoorService(Engines(engines), tokenizer_dir, model_name, path_client=paths)

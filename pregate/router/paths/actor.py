"""The shell that makes the path service a process of its own: start, status, drain, stop; no logic.

A plain class: the cluster package wraps it with `ray.remote`.
"""

from __future__ import annotations

import os
from typing import Any

from pregate.base.telemetry import PLAIN, Telemetry
from pregate.router.link.loop_actor import Export, LoopActor, Server
from pregate.router.paths.options import PathOptions


class PathActor(LoopActor):
    """The path router of a checkpoint and its server in one process; it holds no other weights."""

    def __init__(
        self,
        options: PathOptions,
        endpoint: str,
        telemetry: Telemetry = PLAIN,
        export: Export | None = None,
    ) -> None:
        """What is exported is how many wait."""
        super().__init__(endpoint, export)
        telemetry.begin("path service")
        self._options = options

    def start(self) -> dict[str, Any]:
        """Load the path router and serve; returns {"endpoint", "pid"} when doors may connect."""
        import torch

        from pregate.model.checkpoint import CheckpointReader
        from pregate.model.path_computer import PathComputer
        from pregate.model.quiet import quiet_transformers
        from pregate.model.read_check import Hashes
        from pregate.router.paths.load import load_router
        from pregate.router.paths.prompts import Prompts
        from pregate.router.paths.server import PathServer

        quiet_transformers()
        torch.set_num_threads(self._options.threads)
        reader = CheckpointReader(self._options.model, self._options.parent, hashes=Hashes.WHILE_READ)
        with reader.checked():
            computer = PathComputer(load_router(reader))
        prompts = Prompts(computer, self._options, reader.config.context_tokens, reader.fingerprint)
        self.serve(PathServer(prompts, self._endpoint), "paths")
        return {"endpoint": self._endpoint, "pid": os.getpid()}

    def _numbers(self, server: Server) -> dict[str, Any]:
        return {"num_waiting_for_paths": server.describe()["num_queued"]}

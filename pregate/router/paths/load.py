"""The path router of a checkpoint, without the model it routes for."""

from __future__ import annotations

import torch

from pregate.base.errors import CheckpointError, UserError
from pregate.model.checkpoint import CheckpointReader
from pregate.model.path_router import PathRouter

_PREFIX = "path_router."


def load_router(reader: CheckpointReader) -> PathRouter:
    """Read the path router's tensors and no others. UserError where there is none, CheckpointError where one lacks."""
    config = reader.config
    if not config.has_path_router:
        raise UserError("this checkpoint has no path router; make one with `pregate decouple`")
    tensors: dict[str, torch.Tensor] = {}
    for shard in reader.shards:
        try:
            names = [name for name in shard.tensors if name.startswith(_PREFIX)]
            tensors |= {name.removeprefix(_PREFIX): shard.read(name).float() for name in names}
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{shard.path}: {error}") from error
    router = PathRouter(config.router_shape, config.text_config.vocab_size, config.cuts, config.selection)
    try:
        router.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{reader.path}: path router: {' '.join(str(error).split())}") from error
    return router.eval()

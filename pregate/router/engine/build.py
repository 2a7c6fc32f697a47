"""An engine from a checkpoint and its hosts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pregate.base.log import get_logger
from pregate.model.checkpoint import CheckpointReader
from pregate.model.folder import read_folder
from pregate.model.read_check import Hashes
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.batching import PathBatcher, UnitLayout
from pregate.router.engine.connect import connect
from pregate.router.engine.engine import Engine
from pregate.router.engine.options import EngineOptions
from pregate.router.engine.step_costs import measure

if TYPE_CHECKING:
    from pregate.workers.client.host_client import HostClient

logger = get_logger(__name__)


def build_engine(options: EngineOptions, clients: Sequence[HostClient], copies_LRC: np.ndarray) -> Engine:
    """Load the backbone and join it to its hosts. `copies_LRC` int16 [L, R, C]: the hosts that hold
    each unit, its home first, -1 past the last.

    Raises CheckpointError for a bad folder, UserError when a host refuses, HostLostError when none answers.
    """
    torch.set_num_threads(options.threads)
    parent = Path(options.parent) if options.parent else None
    folder = read_folder(Path(options.model), parent=parent)
    for note in folder.notes:
        logger.warning("%s: %s", folder.path, note)
    reader = CheckpointReader(options.model, parent, hashes=Hashes.WHILE_READ)
    with reader.checked():
        exchange = connect(options, clients, copies_LRC, reader)
        backbone = Backbone.load(options.model, exchange, options.dtype, options.device, parent)
        exchange.warm_up(options.step_tokens)
    engine = Engine(options, folder, backbone, reader.fingerprint)
    if options.batching == "path" and engine.paths is not None:
        unit_bytes = [reader.unit_bytes(layer) for layer in range(reader.num_layers)]
        layout = UnitLayout(copies_LRC[..., 0], unit_bytes, len(clients))
        costs = measure(backbone, engine.runner.kv, layout, reader, options.step_tokens)
        engine.batch_by_path(PathBatcher(layout, costs))
        logger.info("steps are chosen by path; measured: %s", costs)
    elif options.batching == "path":
        logger.warning("--batching path: there is no path router; steps are first come, first served")
    logger.info(
        "engine of %s: %s routing, %d hosts, KV cache of %d tokens (%.2f GB)",
        options.model, engine.config.routing, len(clients), engine.runner.kv.num_slots, engine.runner.kv.nbytes / 1e9,
    )  # fmt: skip
    return engine

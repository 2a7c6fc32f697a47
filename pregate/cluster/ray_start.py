"""Starting Ray in this process, once more where the machine was too busy for it the first time."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from pregate.base.log import get_logger

#: Ray gives its node 30 s to come up, a constant of its own, which other work on the machine can make it exceed.
ATTEMPTS = 2
#: What Ray says then, in a bare Exception.
_TOO_SLOW = "timed out during startup"

logger = get_logger(__name__)


def init_local(folder: Path, num_cpus: int, **options: Any) -> Any:
    """`ray.init` of a Ray of our own without a dashboard, its files in `folder`; returns ray.init's context.

    `num_cpus` are logical CPUs. `folder` must be short (Unix sockets lie in it) and is emptied between attempts. Raises
    what `ray.init` raises; that the node was too slow only after `ATTEMPTS` of them.
    """
    import ray

    fixed: dict[str, Any] = {"address": "local", "include_dashboard": False, "log_to_driver": False}
    start = functools.partial(ray.init, num_cpus=num_cpus, _temp_dir=str(folder), **fixed, **options)
    for _ in range(ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:
            if _TOO_SLOW not in str(error):
                raise
            logger.warning("Ray did not come up in time, starting it once more")
            stop_ray()
            shutil.rmtree(folder, ignore_errors=True)
    return start()


def stop_ray() -> None:
    """Stop Ray and see that every process below this one is gone, so that their folder can be removed."""
    import psutil
    import ray

    children = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(children, timeout=5)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=5)

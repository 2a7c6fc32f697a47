"""Starting Ray in this process, once more where the machine was too busy for it the first time."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil

from pregate.base.log import get_logger

#: Ray gives its node 30 s to come up, a constant of its own, which other work on the machine can make it exceed.
ATTEMPTS = 2
STOP_TIMEOUT_S = 5.0
#: What Ray says then, in a bare Exception.
_TOO_SLOW = "timed out during startup"

logger = get_logger(__name__)


def init_local(folder: Path, num_cpus: int, **options: Any) -> Any:
    """`ray.init` of a Ray of our own without a dashboard, its files in `folder`; returns ray.init's context.

    `num_cpus` are logical CPUs. `folder` must be short (Unix sockets lie in it). Raises what `ray.init` raises; that
    the node was too slow only after `ATTEMPTS` of them. Nothing is left of an attempt that was too slow.
    """
    import ray

    fixed: dict[str, Any] = {"address": "local", "include_dashboard": False, "log_to_driver": False}
    start = functools.partial(ray.init, num_cpus=num_cpus, _temp_dir=str(folder), **fixed, **options)
    others, attempt = children(), 1
    while True:
        try:
            return start()
        except Exception as error:
            if _TOO_SLOW not in str(error):
                raise
            stop_ray(others)
            shutil.rmtree(folder, ignore_errors=True)
            if attempt == ATTEMPTS:
                raise
        attempt += 1
        logger.warning("Ray did not come up in time, starting it once more")


def children() -> list[psutil.Process]:
    """Every process below this one."""
    return psutil.Process().children(recursive=True)


def stop_ray(others: Collection[psutil.Process] = ()) -> None:
    """Stop Ray and see that every process below this one but `others` is gone: their folder can then be removed."""
    import ray

    started = [process for process in children() if process not in others]
    ray.shutdown()
    end_processes(started)


def end_processes(started: Collection[psutil.Process], grace_s: float = STOP_TIMEOUT_S) -> None:
    """Let processes end by themselves for `grace_s`, then kill them."""
    _, left = psutil.wait_procs(started, timeout=grace_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)

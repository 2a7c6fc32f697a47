"""A deployment on a Ray of the tests' own, and clients who ask it all at once and hold its texts to the reference's."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray

from pregate.client.client import Client
from pregate.cluster.config import ServeConfig
from pregate.cluster.launch import Deployment, launch
from pregate.cluster.ray_start import init_local
from pregate.router.doors.grpc_options import GrpcOptions
from tests.equality import ReferenceText, Tally


@contextlib.contextmanager
def deployed(model: Path, **values: object) -> Iterator[tuple[Deployment, str]]:
    """Yield a deployment and the address of its door; there is a Ray already, or one is started for it."""
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            folder = Path(tempfile.mkdtemp(prefix="pgt-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            init_local(folder / "ray", 8, namespace="pregate")
            stack.callback(ray.shutdown)
        made = launch(ServeConfig.from_dict({"model": str(model), "drain_s": 1.0, **values}))
        stack.callback(made.close)
        host, port = made.add_door(GrpcOptions(port=0))
        yield made, f"{host}:{port}"


def processes(name: str) -> list[psutil.Process]:
    """Those of our Ray that are of a class of actors, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"ray::{name}" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def ask_all(
    target: str,
    references: Sequence[ReferenceText],
    at_token: Callable[[int], object] | None = None,
    retry_s: float = 0,
    **access: Any,
) -> None:
    """Ask for every text at once; `at_token(n)` hears of the n-th token of all. Without `retry_s` a request that fails
    once fails for good. `access` are the client's token and certificates."""
    num_tokens, lock, tally = 0, threading.Lock(), Tally()

    def ask(reference: ReferenceText) -> Sequence[int]:
        nonlocal num_tokens
        wanted = len(reference.tokens)
        with client.generate(reference.prompt, wanted, ignore_eos=True) as stream:
            for chunk in stream:
                with lock:
                    num_tokens += len(chunk.token_ids)
                    if at_token is not None:
                        at_token(num_tokens)
        assert stream.completion is not None and len(stream.completion.token_ids) == wanted
        return stream.completion.token_ids

    with (
        Client(target, timeout_s=240, retry_s=retry_s, **access) as client,
        ThreadPoolExecutor(len(references)) as pool,
    ):
        for number, ids in enumerate(pool.map(ask, references)):
            tally.compare_text(f"prompt {number}", references[number], list(ids))
    tally.check()
    print(tally)


class Once:
    """For `at_token`: does something when so many tokens have come, in a thread of its own, and once."""

    def __init__(self, at: int, what: Callable[[], object]) -> None:
        self._at, self._thread = at, threading.Thread(target=what, daemon=True)

    def __call__(self, num_tokens: int) -> None:
        if num_tokens >= self._at and self._thread.ident is None:
            self._thread.start()

    def wait(self) -> None:
        assert self._thread.ident is not None, "the clients had ended before"
        self._thread.join(120)
        assert not self._thread.is_alive()

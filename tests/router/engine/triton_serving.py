"""Serves a checkpoint through the Triton kernels in the interpreter and prints what happened, as JSON.

    TRITON_INTERPRET=1 python tests/router/engine/triton_serving.py CHECKPOINT WEIGHTED

One line for whole layers in one process, one for groups of two hosts in it, one for whole layers of a checkpoint whose
experts have weights, with decode steps captured and replayed (tape.py), one of refusals. `at_start` and `serving`:
every kernel variant launched (its name and what is compiled into it), before the first request and after. `waits`: who
asked for a value of a tensor during a forward pass, which on a device would wait for it.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pregate.kernels import step
from pregate.kernels.tools import warm_up
from pregate.kernels.triton import decode as triton_decode
from pregate.kernels.triton import segments as triton_segments
from pregate.kernels.triton import tiled as triton_tiled
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.engine import decode_graphs
from pregate.router.engine.engine import Engine
from pregate.router.engine.local_exchange import LocalExchange
from tests.equality import ReferenceText, reference_text
from tests.router.engine.tape import Tape
from tests.router.serving import engine_of, hold, hosts_here

KERNELS = {
    triton_tiled: ("gate_up_kernel", "down_kernel", "sum_kernel"),
    triton_decode: ("decode_gate_up_kernel", "decode_down_kernel"),
    triton_segments: ("segments_kernel",),
}
WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class Watched:
    """A kernel that notes each variant it is launched as."""

    def __init__(self, name: str, kernel: Any, seen: set[str]) -> None:
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            types = [str(getattr(arg, "dtype", None)) for arg in args if not isinstance(arg, int)]
            # Sizes apart from widths are not compiled in (`do_not_specialize`), and a width never changes here.
            self.seen.add(f"{self.name} {types} {sorted(constants.items())}")
            mode = _get_current_dispatch_mode()
            if isinstance(mode, Tape):
                mode.launch(lambda: self.kernel[grid](*args, **constants))
            else:
                self.kernel[grid](*args, **constants)

        return launch


def watch_kernels(seen: set[str]) -> None:
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Watched(name, getattr(module, name), seen))


def watch_waits(engine: Engine, waits: list[str]) -> None:
    """Note who asks for values while the backbone runs; the interpreter's own asking does not count."""
    backbone = engine.runner.backbone
    setattr(backbone, "forward", watched(backbone.forward, waits))  # noqa: B010 (it takes any arguments)


def capture_steps(engine: Engine, waits: list[str]) -> list[Tape]:
    """Have the engine capture its decode steps, on tapes; what is asked of the tensors meanwhile is noted."""
    tapes: list[Tape] = []

    def capture(step: Callable[[], torch.Tensor], *_: Any) -> tuple[Tape, torch.Tensor]:
        tape, logits_BV = Tape.capture(watched(step, waits))
        tapes.append(tape)
        return tape, logits_BV

    decode_graphs.capture = capture
    runner, exchange = engine.runner, engine.exchange
    assert isinstance(exchange, LocalExchange)
    runner.graphs = decode_graphs.DecodeGraphs(runner.backbone, exchange, runner.kv)
    return tapes


def watched(forward: Callable[..., torch.Tensor], waits: list[str]) -> Callable[..., torch.Tensor]:
    def watched_forward(*args: Any) -> torch.Tensor:
        kept = {name: getattr(torch.Tensor, name) for name in WAITING}
        for name, method in kept.items():
            setattr(torch.Tensor, name, noting(name, method))
        try:
            torch.ones(1).item()
            assert waits.pop().startswith("item"), "the watch sees a wait"
            return forward(*args)
        finally:
            for name, method in kept.items():
                setattr(torch.Tensor, name, method)

    def noting(name: str, method: Any) -> Any:
        def call(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            stack = traceback.extract_stack()[:-1]
            if not any("/triton/" in frame.filename for frame in stack):
                waits.append(f"{name} at {stack[-1].filename}:{stack[-1].lineno}")
            return method(self, *args, **options)

        return call

    return watched_forward


def serve_with(
    path: Path, num_hosts: int, references: list[ReferenceText], seen: set[str], captured: bool
) -> dict[str, Any]:
    seen.clear()
    clients = hosts_here(path, num_hosts, expert_ffn="triton")
    with engine_of(path, clients, step_tokens=20) as engine:
        at_start, waits = sorted(seen), []
        seen.clear()
        watch_waits(engine, waits)
        tapes = capture_steps(engine, waits) if captured else []
        tally = hold(engine, "triton", references, together=(True,))
        status = [client._host.status() for client in clients]
        facts = {"whole": isinstance(engine.exchange, LocalExchange), "compared": tally.compared, "hosts": status}
        facts |= {"captures": len(tapes), "replays": sum(tape.num_replays for tape in tapes)}
        return {**facts, "at_start": at_start, "serving": sorted(seen), "waits": waits}


def refusals(path: Path) -> dict[str, Any]:
    """What the entry point and a host say to what they must not do."""
    host: Any = hosts_here(path, 1, expert_ffn="triton-int8")[0]._host
    found: dict[str, Any] = {"triton-int8": host.local_units(torch.device("cpu"), torch.float32)}
    for ids in (-2, 4):
        try:
            host._ffn.segments(torch.full((1, 1, 1), ids), 4, 1)
        except ValueError as error:
            found[f"id {ids}"] = str(error)
    return found


def main() -> None:
    assert warm_up.DECODE_TOKENS == triton_decode.MAX_TOKENS, "the smallest batch past decoding must be warmed up"
    path = Path(sys.argv[1])
    seen: set[str] = set()
    step.step_kernels = lambda *_: None  # as on a device
    watch_kernels(seen)
    for served, num_hosts, captured in ((path, 1, False), (path, 2, False), (Path(sys.argv[2]), 1, True)):
        model = RoutedForCausalLM.from_pretrained(served).eval()
        # Captured: enough for contexts that grow into a second block of the cache.
        references = [reference_text(model, [1, *range(40, 40 + n)], 9 if captured else 3) for n in (11, 3)]
        print(json.dumps(serve_with(served, num_hosts, references, seen, captured)), flush=True)
    print(json.dumps(refusals(path)), flush=True)


if __name__ == "__main__":
    main()

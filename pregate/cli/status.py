"""`pregate status`: what a server is and what it is at, once; `pregate top`: its load and its hosts' experts, live."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pregate.base.errors import UnavailableError
from pregate.base.options import options
from pregate.cli.flags import command
from pregate.cli.printed import Output
from pregate.cli.target import Target, open_client

if TYPE_CHECKING:
    from pregate.client.answers import HostStatus, Loads, ModelInfo, ServerInfo

COLUMNS = ("host", "state", "resident", "to fetch", "hits", "misses", "hit rate", "read", "ahead", "wasted", "waited")


@options()
class TopOptions:
    """How often a server is asked."""

    every: Annotated[float, Field(gt=0, description="Seconds between looks.")] = 1.0


@command(Target, Output)
def status(target: Target, output: Output) -> None:
    """Show what a server is, and what it is at now."""
    with open_client(target.target, target, retry_s=0) as client:
        server, model, loads, reason = client.server_info(), None, None, ""
        try:
            model, loads = client.model_info(), client.loads()
        except UnavailableError as error:
            reason = str(error)
    if output.json:
        parts = {"server": server, "model": model, "loads": loads}
        print(json.dumps({name: part and asdict(part) for name, part in parts.items()} | {"error": reason}))
    else:
        _print_status(server, model, loads)
    if reason:
        raise UnavailableError(reason)


def _print_status(server: ServerInfo, model: ModelInfo | None, loads: Loads | None) -> None:
    shape = ""
    if model is not None:
        hosts = f"{model.num_hosts} host{'s' if model.num_hosts != 1 else ''}"
        if server.options.get("hosts") == "0":
            hosts = "experts in the engine's process"
        shape = f"{model.num_layers} layers, {model.routing} routing, {hosts}, "
        shape += f"context {model.max_context_length}, "
    print(f"{server.model}: {shape}door up {_duration(server.uptime_s)}")
    print(f"pregate {server.version}: {', '.join(f'{name} {v}' for name, v in sorted(server.versions.items()))}")
    if server.node:
        print(f"door and engines on {server.node}")
    if server.logs:
        print(f"logs: {server.logs}/worker-*.err on its machine")
    if loads is None:
        return
    print(f"refuses requests: {loads.unavailable}" if loads.unavailable else "takes requests")
    for engine in loads.engines:
        doing = f"{engine.num_running} running, {engine.num_queued} queued, {engine.num_steps} steps"
        print(f"engine {engine.number}: {engine.unavailable or doing}")
    if (paths := loads.path_service) is not None:
        doing = f"{paths.busy_with or 'idle'}, {paths.num_queued} queued, {paths.num_turns} turns"
        print(f"path service: {paths.unavailable or doing}")
    for host in loads.hosts:
        if host.lost:
            print(f"host {host.host_id} is lost for {_duration(host.lost_s)}: {host.lost}")
    _console().print(table(loads))


@command(Target, TopOptions)
def top(target: Target, options: TopOptions) -> None:
    """Show a server's load until Ctrl-C; without a terminal, once."""
    from rich.live import Live
    from rich.text import Text

    with open_client(target.target, target, retry_s=0) as client:
        if not sys.stdout.isatty():
            _console().print(table(client.loads()))
            return
        with Live(table(client.loads()), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(options.every)
                try:
                    live.update(table(client.loads()), refresh=True)
                except UnavailableError as error:  # it may come back
                    live.update(Text(f"{target.target}: {error}"), refresh=True)


def table(loads: Loads) -> Any:
    """Return a table of the hosts, their sum in the last row where there are several, under what is asked of them."""
    from rich.table import Table
    from rich.text import Text

    used = 1 - loads.kv_blocks_free / max(1, loads.kv_blocks)
    waiting = f"{loads.num_queued} queued, {loads.num_waiting_for_paths} waiting for paths"
    cache = f"KV {used:.0%} of {loads.kv_bytes / 1e6:.0f} MB, {loads.num_preempted} preempted"
    doing = loads.unavailable or loads.busy_with or "idle"
    made = Table(*COLUMNS, title=Text(f"{loads.num_running} running, {waiting}; {cache}; {doing}"))
    for host in loads.hosts:
        state = f"lost {_duration(host.lost_s)}" if host.lost else "serves"
        if host.node:
            state += f" on {host.node}"
        made.add_row(str(host.host_id), state, *row([host]))
    if len(loads.hosts) > 1:
        made.add_row("all", "", *row(loads.hosts))
    return made


def row(hosts: Sequence[HostStatus]) -> list[str]:
    """Return the cells of hosts together."""
    total = {
        name: sum(getattr(host, name) for host in hosts) for name in asdict(hosts[0]) if name not in ("lost", "node")
    }
    uses = total["hits"] + total["misses"]
    rate = f"{total['hits'] / uses:.1%}" if uses else "-"
    sizes = [f"{total[name] / 1e6:.1f} MB" for name in ("read_bytes", "prefetched_bytes", "wasted_bytes")]
    counts = [str(total[name]) for name in ("num_units", "num_pending", "hits", "misses")]
    return [*counts, rate, *sizes, f"{total['stall_s']:.2f} s"]


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))

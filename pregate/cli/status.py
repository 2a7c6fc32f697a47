"""`pregate status`: what a server is at, and how its hosts' experts come and go; a live table on a terminal."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pregate.base.options import options
from pregate.cli.flags import command
from pregate.cli.printed import Output
from pregate.cli.text import open_client

if TYPE_CHECKING:
    from pregate.client.answers import HostStatus, ModelInfo

COLUMNS = ("host", "resident", "to fetch", "hits", "misses", "hit rate", "read", "ahead", "wasted", "waited")


@options()
class StatusOptions:
    """Which server, and how often it is asked."""

    target: Annotated[str, Field(description="HOST:PORT of a server.")]
    token_file: Annotated[Path | None, Field(description="File with the server's bearer token.")] = None
    ca: Annotated[Path | None, Field(description="PEM file to check the server's TLS certificate with.")] = None
    every: Annotated[float, Field(gt=0, description="Seconds between looks, on a terminal.")] = 1.0


@command(StatusOptions, Output)
def status(options: StatusOptions, output: Output) -> None:
    """Show what a server is at: requests, and its hosts' experts; on a terminal until Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    with open_client(options.target, options.token_file, options.ca) as client:
        if output.json:
            print(json.dumps(asdict(client.model_info())))
        elif not sys.stdout.isatty():
            Console(width=120).print(table(client.model_info()))
        else:
            with Live(table(client.model_info()), auto_refresh=False) as live:
                while True:
                    time.sleep(options.every)
                    live.update(table(client.model_info()), refresh=True)


def table(info: ModelInfo) -> Any:
    """Return a table of the hosts, their sum in the last row where there are several."""
    from rich.table import Table

    doing = info.unavailable or info.busy_with or "idle"
    title = f"{info.model}: {info.num_running} running, {info.num_queued} queued, {info.num_steps} steps; {doing}"
    made = Table(*COLUMNS, title=title)
    for host in info.hosts:
        made.add_row(str(host.host_id), *row([host]))
    if len(info.hosts) > 1:
        made.add_row("all", *row(info.hosts))
    return made


def row(hosts: list[HostStatus] | tuple[HostStatus, ...]) -> list[str]:
    """Return the cells of hosts together."""
    total = {name: sum(getattr(host, name) for host in hosts) for name in asdict(hosts[0])}
    uses = total["hits"] + total["misses"]
    rate = f"{total['hits'] / uses:.1%}" if uses else "-"
    sizes = [f"{total[name] / 1e6:.1f} MB" for name in ("read_bytes", "prefetched_bytes", "wasted_bytes")]
    counts = [str(total[name]) for name in ("num_units", "num_pending", "hits", "misses")]
    return [*counts, rate, *sizes, f"{total['stall_s']:.2f} s"]

"""Every wire of a deployment in one process, to be attacked from outside.

    python tests/chaos/doors_process.py CHECKPOINT FOLDER

Prints one line of JSON when it serves: where gRPC, HTTP, engine, path service and the expert host listen.
"""

import asyncio
import json
import os
import sys
import threading
from pathlib import Path

import uvicorn

from pregate.base import log
from pregate.model.checkpoint import CheckpointReader
from pregate.model.quiet import quiet_transformers
from pregate.router.doors.connect import connect_service
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.grpc_server import GrpcServer
from pregate.router.doors.openai_app import build_app
from pregate.router.link.server import EngineServer
from pregate.router.paths.actor import PathActor
from pregate.router.paths.options import PathOptions
from pregate.workers.client.channel import ChannelClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.host.server import HostServer, ServerOptions
from pregate.workers.link.protocol import HostAddress
from tests.router.serving import engine_of, placement_of, units_of


async def doors(engine: str, paths: str, checkpoint: str, where: dict) -> None:
    """A gRPC door and an HTTP door, each with a service of its own, until this process is killed."""
    services = [connect_service([engine], paths, checkpoint, "tiny") for _ in range(2)]
    for service in services:
        await service.model_info()
    grpc_port = await GrpcServer(services[0], GrpcOptions(port=0)).start()
    config = uvicorn.Config(
        build_app(services[1], timeout_s=20), host="127.0.0.1", port=0, lifespan="off", log_config=None
    )
    http = uvicorn.Server(config)
    serving = asyncio.ensure_future(http.serve())
    while not http.started:
        await asyncio.sleep(0.05)
    where |= {"grpc": grpc_port, "http": http.servers[0].sockets[0].getsockname()[1]}
    print(json.dumps(where), flush=True)
    await serving


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def main(checkpoint: str, folder: str) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    quiet_transformers()
    log.configure("target")
    path = Path(checkpoint)
    host = ExpertHost(CheckpointReader(path), units_of(placement_of(path, 1), 0), HostOptions())
    server = HostServer(host, ServerOptions(f"ipc://{folder}/h/0"))
    server.start()
    address = HostAddress(0, server.endpoint, host.incarnation, 0, "127.0.0.1", None)
    paths = PathActor(PathOptions(model=checkpoint), f"ipc://{folder}/paths")
    paths.start()
    where = {"engine": f"ipc://{folder}/engine", "paths": f"ipc://{folder}/paths", "host": server.endpoint}
    where |= {"data": server.data_endpoint, "fingerprint": host.fingerprint}
    with engine_of(path, [ChannelClient(address)], step_tokens=64, max_running=16, max_queued=64) as engine:
        loop = threading.Thread(
            target=EngineServer(engine, where["engine"]).run, args=(threading.Event(),), daemon=True
        )
        loop.start()
        asyncio.run(doors(where["engine"], where["paths"], checkpoint, where))


if __name__ == "__main__":
    main(*sys.argv[1:])

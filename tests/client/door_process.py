"""A front door in a process of its own, to be killed.

    python tests/client/door_process.py ENDPOINT CHECKPOINT PORT

Prints its port when it listens.
"""

import asyncio
import sys

from pregate.router.doors.door import DoorActor
from pregate.router.doors.grpc_options import GrpcOptions


async def main(endpoint: str, checkpoint: str, port: str) -> None:
    actor = DoorActor([endpoint], None, checkpoint, "tiny", GrpcOptions(port=int(port)))
    print((await actor.start())["port"], flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""pregate: dense language models as mixtures of experts whose paths are known before the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pregate.client.aio import AsyncClient
    from pregate.client.client import Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> object:
    """Import the clients on first use, so that `import pregate` loads neither grpc nor anything heavier."""
    if name == "Client":
        from pregate.client.client import Client

        return Client
    if name == "AsyncClient":
        from pregate.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module 'pregate' has no attribute {name!r}")

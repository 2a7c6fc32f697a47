"""How commands reach a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import options
from pregate.base.tokens import read_tokens

if TYPE_CHECKING:
    from pregate.client.client import Client

SERVERS = "HOST:PORT of a server, or of several with commas: the first that answers is asked."


@options(kw_only=True)
class Credentials:
    """What a server asks for, and what it is known by."""

    token_file: Annotated[Path | None, Field(description="File with the server's bearer token.")] = None
    ca: Annotated[Path | None, Field(description="PEM file to check the server's TLS certificate with.")] = None
    cert: Annotated[Path | None, Field(description="PEM certificate to show the server.")] = None
    key: Annotated[Path | None, Field(description="PEM key of --cert.")] = None


@options()
class Patience:
    """How long a server that is away is waited for."""

    retry_s: Annotated[
        float, Field(ge=0, description="Seconds a server that is away, or starts again, is asked again.")
    ] = 60.0


@options(kw_only=True)
class Target(Credentials):
    """A server, or several that serve the same."""

    target: Annotated[str, Field(description=SERVERS)]


def open_client(target: str, credentials: Credentials, retry_s: float) -> Client:
    """A client of the servers at `target`; UserError where that is not HOST:PORT."""
    from pregate.client.client import Client

    for one in target.split(","):
        host, _, port = one.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError.of("--target", one, "must be HOST:PORT")
    token = read_tokens(credentials.token_file)[0] if credentials.token_file else None
    return Client(target.split(","), token, credentials.ca, cert=credentials.cert, key=credentials.key, retry_s=retry_s)

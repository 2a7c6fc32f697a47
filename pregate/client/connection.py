"""`Connection`: where servers are and how they are spoken to; sync and async channels are opened alike."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc

from pregate.base.backoff import Backoff
from pregate.base.errors import BY_CODE, PregateError, UnavailableError, UserError
from pregate.base.log import get_logger
from pregate.base.network import PORTS, is_loopback, is_port
from pregate.base.pem import read_key, read_pem
from pregate.base.tokens import is_token
from pregate.client.handshake import trouble_with
from pregate.client.proto import pregate_pb2_grpc as pb_grpc

logger = get_logger(__name__)
#: What gRPC itself says where no connection comes about.
_SIGNS_OF_NONE = (
    "failed to connect",
    "backends failing",
    "Socket closed",
    "Connection reset",
    "recvmsg:",
    "andshak",
    "SSL",
    "Broken pipe",
)
#: And where what is sent is larger than it takes: trying again does not help.
_SIGNS_OF_SIZE = ("larger than max", "exceeds hard limit", "exceeds soft limit")
#: No `retryPolicy`: with one, gRPC 1.85 loses the end of a call whose server answers UNAVAILABLE and goes away, and the
#: caller waits for ever, past its deadline. And it could not resume.
_SERVICE_CONFIG = {"loadBalancingConfig": [{"round_robin": {}}]}
#: Pings go on while nothing else does, or a server that is gone without a word would be waited for until the deadline.
#: A channel that could not connect tries again soon; to connect may take as long as on a busy machine, or a far one.
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)
#: A year.
MAX_TIMEOUT_S = 365 * 86_400.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


class Connection:
    """Channels to `targets`, opened when they are needed by `library`: grpc, or grpc.aio.

    Raises UserError for files that cannot be read, and a token that would travel in clear text.
    """

    def __init__(
        self,
        library: Any,
        target: str | Sequence[str],
        token: str | None,
        ca: str | Path | None,
        cert: str | Path | None,
        key: str | Path | None,
        timeout_s: float,
        retry_s: float,
    ) -> None:
        if _checked(timeout_s) <= 0:
            raise UserError.of("timeout_s", timeout_s, "must be above 0 seconds")
        if not _is_number(retry_s) or not retry_s >= 0:
            raise UserError.of("retry_s", retry_s, "must be 0 (each target once) or more seconds")
        self.targets = _targets(target)
        far = next((t for t in self.targets if not stays_here(t)), None)
        if token is not None and ca is None and far is not None:
            raise UserError.of("token", f"for {far}", "would travel in clear text; give ca too")
        self._library, self._timeout_s, self._retry_s = library, timeout_s, retry_s
        self._files = ca, cert, key
        self._credentials = _credentials(ca, cert, key)
        self._open: dict[str, tuple[Any, Any, Any]] = {}  # channel, stubs of Pregate and Health
        self._at = 0  # of the targets: the one that answered last
        self._has_token = token is not None
        self.metadata = () if token is None else (("authorization", _bearer(token)),)

    @property
    def target(self) -> str:
        """The one that is asked now."""
        return self.targets[self._at]

    @property
    def stub(self) -> Any:
        return self._opened()[1]

    @property
    def health(self) -> Any:
        return self._opened()[2]

    def attempts(self, timeout_s: float | None = None) -> Attempts:
        """Begin a call. UserError for a `timeout_s` that is none; one that has passed is for the call to find."""
        return Attempts(self, self._timeout_s if timeout_s is None else _checked(timeout_s), self._retry_s)

    def leave(self, target: str) -> None:
        """Ask another one from now on; a call that found this out before may have done so already."""
        if self.target == target:
            self._at = (self._at + 1) % len(self.targets)

    def take_channels(self) -> list[Any]:
        """All channels, to be closed."""
        opened, self._open = self._open, {}
        return [channel for channel, _, _ in opened.values()]

    def error_of(self, error: grpc.RpcError, target: str, *, asks: bool = True) -> PregateError:
        """Return the typed error of a call's status; the sentence is the server's. Where there was no connection the
        target `asks` for TLS or a certificate, perhaps, which takes a moment to find out."""
        code, details = error.code().name, error.details() or "no details"  # pyright: ignore[reportAttributeAccessIssue]
        if code == "UNAUTHENTICATED":
            what = "is not one that it knows" if self._has_token else "is missing"
            return UserError(f"{target} asks for a bearer token: token (`--token-file` of a command) {what}")
        if code == "RESOURCE_EXHAUSTED" and any(sign in details for sign in _SIGNS_OF_SIZE):  # no full queue
            return UserError(f"{target}: {details}")
        if code == "UNAVAILABLE" and any(sign in details for sign in _SIGNS_OF_NONE):
            known = trouble_with(target, *self._files) if asks else None
            refused = "Connection refused" in details
            sentence = f"nothing listens at {target} (--target)" if refused else f"{target}: {details}"
            return known or UnavailableError(sentence)
        if code in BY_CODE and code != "INTERNAL":
            return BY_CODE[code](details)
        return PregateError(f"{target} answered {code}: {details}")

    def _opened(self) -> tuple[Any, Any, Any]:
        target = self.target
        if target not in self._open:
            # A proxy of the environment is no way to this machine, and would see a token sent in clear text.
            options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if stays_here(target) else _CHANNEL_OPTIONS
            if self._credentials is None:
                channel = self._library.insecure_channel(target, options=options)
            else:
                channel = self._library.secure_channel(target, self._credentials, options=options)
            self._open[target] = channel, pb_grpc.PregateStub(channel), health_pb2_grpc.HealthStub(channel)
        return self._open[target]


class Attempts:
    """When a call that met UNAVAILABLE is sent again, and where: at once to targets that were not asked, then to all in
    turn, with growing waits, for `retry_s` after something last came, within the call's deadline."""

    def __init__(self, connection: Connection, timeout_s: float, retry_s: float) -> None:
        self._connection, self._retry_s = connection, retry_s
        self._deadline_s = time.monotonic() + timeout_s
        num_free = len(connection.targets) - 1
        self._backoff = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S, steady_s=0.0, num_free=num_free)
        self._failing_since_s = 0.0
        self._target = connection.target

    def begin(self) -> dict[str, Any]:
        """What the call is to be given; it goes to the connection's target."""
        self._target = self._connection.target
        return {"timeout": self._deadline_s - time.monotonic(), "metadata": self._connection.metadata}

    def succeeded(self) -> None:
        """Something came."""
        self._backoff.runs(time.monotonic())

    def wait_s(self, status: grpc.RpcError) -> float:
        """How long to wait before the next attempt; raises the typed error where there is none."""
        now_s = time.monotonic()
        wait_s = self._backoff.failed(now_s)
        is_first = self._backoff.attempts == 1
        self._failing_since_s = now_s if is_first else self._failing_since_s
        error = self._connection.error_of(status, self._target, asks=is_first)
        rounds = self._backoff.attempts - len(self._connection.targets)
        if not isinstance(error, UnavailableError) or (rounds >= 0 and not self._retry_s):
            raise error from None
        wait_s *= random.uniform(0.5, 1.0)  # so that clients of one lost server do not come back all at once
        until_s = self._deadline_s if rounds < 0 else min(self._failing_since_s + self._retry_s, self._deadline_s)
        if now_s + wait_s > until_s:
            raise error from None
        if not rounds:
            logger.warning("%s; asking again for %.0f s", error, until_s - now_s)
        self._connection.leave(self._target)
        return wait_s


def stays_here(target: str) -> bool:
    """Whether what is sent to `target` does not leave this machine."""
    return target.startswith("unix:") or is_loopback(target.rpartition(":")[0])


def _checked(timeout_s: Any) -> float:
    """The number of seconds it is. gRPC makes a date of it, and endless ones and longer ones have passed at once."""
    if not _is_number(timeout_s) or not timeout_s <= MAX_TIMEOUT_S:
        raise UserError.of("timeout_s", timeout_s, f"must be a number of seconds, at most {MAX_TIMEOUT_S:.0f}")
    return float(timeout_s)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _targets(target: Any) -> tuple[str, ...]:
    targets = (target,) if isinstance(target, str) else tuple(target) if isinstance(target, Sequence) else ()
    if not targets or not all(isinstance(one, str) and one for one in targets):
        raise UserError.of("--target", ascii(target), "must be HOST:PORT, or a list of such")
    for one in targets:
        port = one.rpartition(":")[2]
        if port.isdecimal() and not is_port(port):
            raise UserError.of("--target", one, PORTS)
    return targets


def _bearer(token: Any) -> str:
    if not isinstance(token, str) or not is_token(token):
        raise UserError("token: must be text of printable ASCII characters, which are all that a header carries")
    return f"Bearer {token}"


def _credentials(
    ca: str | Path | None, cert: str | Path | None, key: str | Path | None
) -> grpc.ChannelCredentials | None:
    if (cert is None) != (key is None):
        raise UserError.of("cert" if cert else "key", cert or key, "needs the other of cert and key beside it")
    if cert is not None and ca is None:
        raise UserError.of("cert", cert, "needs ca beside it, which turns TLS on")
    if ca is None:
        return None
    own = () if cert is None or key is None else (read_key("key", key), read_pem("cert", cert))
    return grpc.ssl_channel_credentials(read_pem("ca", ca), *own)

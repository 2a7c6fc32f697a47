"""What `Client` and `AsyncClient` share: their arguments, and how a request begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from typing_extensions import Unpack

from pregate.base.completion import Completion
from pregate.client.connection import Connection
from pregate.client.options import GenerateOptions, Messages, Prompt, chat_field, generate_request, prompt_field
from pregate.client.progress import Progress
from pregate.client.proto import pregate_pb2 as pb


class Running:
    """A running request, whoever waits for it."""

    def __init__(self, connection: Connection, request: pb.GenerateRequest, timeout_s: float | None) -> None:
        self._connection, self._attempts = connection, connection.attempts(timeout_s)
        self._progress = Progress(request)
        self._begin()

    def _begin(self) -> None:
        raise NotImplementedError

    def _send(self) -> Any:
        return self._connection.stub.Generate(self._progress.request, **self._attempts.begin())

    @property
    def request_id(self) -> str:
        """What `Client.abort` ends it by."""
        return self._progress.request.request_id

    @property
    def completion(self) -> Completion | None:
        """The first completion, None while it runs."""
        return self._progress.completion

    @property
    def completions(self) -> list[Completion]:
        return self._progress.completions


_R = TypeVar("_R", bound=Running)


class Caller(Generic[_R]):
    """Begins requests as `_generation`s, by gRPC's `_library`."""

    _library: ClassVar[Any]
    _generation: type[_R]

    def __init__(
        self,
        target: str | Sequence[str],
        token: str | None = None,
        ca: str | Path | None = None,
        timeout_s: float = 600.0,
        *,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        retry_s: float = 60.0,
    ) -> None:
        self._connection = Connection(self._library, target, token, ca, cert, key, timeout_s, retry_s)

    def generate(self, prompt: Prompt, max_tokens: int | None = None, **options: Unpack[GenerateOptions]) -> _R:
        """Start a request and return its chunks as they arrive. `prompt` is text or token ids. Without `max_tokens` a
        text has up to 64, and a chat's answer 512, or what the context leaves; more than that leaves is a UserError."""
        return self._start(prompt_field(prompt), max_tokens, options)

    def chat(self, messages: Messages, max_tokens: int | None = None, **options: Unpack[GenerateOptions]) -> _R:
        """`generate` the answer to messages, each with a `role` and a `content`, by the model's chat template."""
        return self._start(chat_field(messages), max_tokens, options)

    def _start(self, given: dict[str, Any], max_tokens: int | None, options: GenerateOptions) -> _R:
        request = generate_request(given, max_tokens, options)
        return self._generation(self._connection, request, options.get("timeout_s"))

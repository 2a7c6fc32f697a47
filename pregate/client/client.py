"""The gRPC client: text or token ids in; streamed text, completions and expert paths out."""

from __future__ import annotations

import array
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pregate.base.completion import Chunk, Completion, TokenLogprob
from pregate.base.errors import BY_CODE, PregateError, UnavailableError, UserError
from pregate.base.network import is_loopback
from pregate.base.sampling import check_ids
from pregate.client.proto import pregate_pb2 as pb
from pregate.client.proto import pregate_pb2_grpc as pb_grpc

_T = TypeVar("_T")
#: What a plain client hears from a port that speaks TLS.
_SIGNS_OF_TLS = ("Socket closed", "Connection reset", "recvmsg:")
#: No `retryPolicy`: with one, gRPC 1.85 loses the end of a call whose server answers UNAVAILABLE and goes away, and the
#: caller waits for ever, past its deadline.
_SERVICE_CONFIG = {"loadBalancingConfig": [{"round_robin": {}}]}
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
)


@dataclass(frozen=True)
class Route:
    """The routed experts of every prompt token: `paths[token][layer]` holds their ids, ascending.

    `exact`: the path is the routing; otherwise it is a forecast. `version` names the path router.
    """

    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    paths: tuple[tuple[tuple[int, ...], ...], ...]
    exact: bool
    version: str


@dataclass(frozen=True)
class HostStatus:
    """Experts of one host since it started: uses that found theirs in its slot and that did not, bytes read, of these
    ahead, and of these for nothing; seconds waited. It holds `num_units` now and means to fetch `num_pending`."""

    host_id: int
    num_units: int
    num_pending: int
    hits: int
    misses: int
    read_bytes: int
    prefetched_bytes: int
    wasted_bytes: int
    stall_s: float


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves, and how busy it is.

    `unavailable` says why it refuses requests now, "" when it takes them. `busy_with` is what its engine computes now
    ("": nothing), for `busy_s` already; `num_steps` counts the steps it has begun, of together `num_step_tokens` tokens
    and `num_step_units` units; `batching` is how their tokens are chosen.
    """

    model: str
    max_context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    routing: str
    has_path_router: bool
    num_layers: int
    num_hosts: int
    num_running: int
    num_queued: int
    version: str
    num_steps: int
    busy_with: str
    busy_s: float
    unavailable: str
    num_step_tokens: int = 0
    num_step_units: int = 0
    batching: str = ""
    hosts: tuple[HostStatus, ...] = ()


class Generation(Iterator[Chunk]):
    """A running request: iterate for its chunks; `completion` is set when the iteration has ended, of `n` the first,
    and `completions` are all, in the order they ended.

    `cancel`, or leaving a `with` block, gives the request up.
    """

    def __init__(self, call: Any, translate: Callable[[grpc.RpcError], PregateError]) -> None:
        self._call = call
        self._translate = translate
        self._cancelled = False
        self.completions: list[Completion] = []

    @property
    def completion(self) -> Completion | None:
        """The first completion, None while it runs."""
        return next((c for c in self.completions if c.index == 0), None)

    def __next__(self) -> Chunk:
        while True:
            try:
                response = next(self._call)
            except grpc.RpcError as error:
                if self._cancelled:
                    raise StopIteration from None
                raise self._translate(error) from None
            if response.WhichOneof("response") == "chunk":
                chunk = response.chunk
                return Chunk(
                    tuple(chunk.token_ids), chunk.text, chunk.prompt_tokens, chunk.completion_tokens, chunk.index,
                    _logprobs(chunk.output_logprobs), _logprobs(chunk.input_logprobs),
                )  # fmt: skip
            reply = response.complete
            counted = (reply.finish_reason, reply.prompt_tokens, reply.completion_tokens)
            ids, rows = tuple(reply.output_ids), tuple(reply.rows_per_host)
            units = reply.unit_hits, reply.unit_misses, reply.stall_s
            logprobs = _logprobs(reply.output_logprobs), _logprobs(reply.input_logprobs)
            self.completions.append(
                Completion(reply.text, ids, *counted, rows, reply.request_id, reply.index, *logprobs, *units)
            )

    def cancel(self) -> None:
        """Stop the request on the server; the iteration ends. A finished one is left as it is."""
        self._cancelled = True
        self._call.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Client:
    """Talks to one pregate server at `target` (`HOST:PORT`).

    `ca` (a PEM file) turns TLS on, `token` is sent with every call, `timeout_s` is each call's deadline. Methods raise
    the errors of pregate.base.errors: UserError, NotFoundError, QueueFullError, UnavailableError, DeadlineError,
    PregateError. Threads may share a client. Close it, or use it in a `with` block.
    """

    def __init__(
        self, target: str, token: str | None = None, ca: str | Path | None = None, timeout_s: float = 600.0
    ) -> None:
        if timeout_s <= 0:
            raise UserError.of("timeout_s", timeout_s, "must be above 0 seconds")
        if token is not None and ca is None and not stays_here(target):
            raise UserError.of("token", f"for {target}", "would travel in clear text; give ca too")
        self._target = target
        self._timeout_s = timeout_s
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._channel = _open_channel(target, ca)
        self._translate = functools.partial(_translate, target=target, plain=ca is None)
        self._stub = pb_grpc.PregateStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = True,
        ignore_eos: bool = False,
        stop_token_ids: Sequence[int] = (),
        stop: str | Sequence[str] = (),
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        n: int = 1,
        priority: int = 0,
        timeout_s: float | None = None,
        model: str = "",
        request_id: str = "",
    ) -> Generation:
        """Start a request and return its chunks as they arrive; with `stream` False only its `completion` arrives.

        `prompt` is text or token ids. Temperature 0 is greedy. A text ends before the first of its `stop` texts or ids.
        `logprobs` and `prompt_logprobs` give those of each token and of that many likeliest ones. `n` completions share
        the prompt. Of requests that wait those of the lowest `priority` come first; `timeout_s` is this one's deadline.
        docs/serve.md says in which order the options work.
        """
        request = _build(
            pb.GenerateRequest,
            request_id=request_id,
            sampling_params=_build(
                pb.SamplingParams,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                ignore_eos=ignore_eos,
                stop_token_ids=_ids("stop_token_ids", stop_token_ids),
                stop=[stop] if isinstance(stop, str) else stop,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                min_tokens=min_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                n=n,
            ),
            priority=priority,
            stream=stream,
            model=model,
            **_input(prompt),
        )
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return Generation(call, self._translate)

    def complete(self, prompt: str | Sequence[int], max_tokens: int = 64, **options: Any) -> Completion:
        """Generate and wait for the whole; `options` are those of `generate` (`temperature`, `seed`, ...)."""
        with self.generate(prompt, max_tokens, **{**options, "stream": False}) as generation:
            for _ in generation:
                pass
        if generation.completion is None:
            raise PregateError(f"{self._target}: the stream ended without a completion")
        return generation.completion

    def route(self, prompt: str | Sequence[int], *, model: str = "") -> Route:
        """Return the expert path of every prompt token, without a forward pass."""
        request = _build(pb.RouteRequest, model=model, **_input(prompt))
        reply = self._unary(self._stub.Route, request)
        ids = array.array("h", reply.expert_ids)
        if sys.byteorder == "big":
            ids.byteswap()
        width, depth = reply.num_active or 1, reply.num_layers or 1
        rows = [tuple(e for e in ids[i : i + width] if e >= 0) for i in range(0, len(ids), width)]
        paths = tuple(tuple(rows[t : t + depth]) for t in range(0, len(rows), depth))
        return Route(tuple(reply.token_ids), tuple(reply.tokens), paths, reply.exact, reply.version)

    def model_info(self, *, model: str = "") -> ModelInfo:
        """Return what the server serves."""
        reply = self._unary(self._stub.GetModelInfo, pb.GetModelInfoRequest(model=model))
        values = {name: getattr(reply, name) for name in ModelInfo.__dataclass_fields__}
        fields = HostStatus.__dataclass_fields__
        hosts = tuple(HostStatus(**{name: getattr(host, name) for name in fields}) for host in reply.hosts)
        return ModelInfo(**{**values, "eos_token_ids": tuple(reply.eos_token_ids), "hosts": hosts})

    def health(self, service: str = "") -> bool:
        """Return whether the server takes requests; raises UnavailableError when nothing answers at `target`."""
        check: Any = self._health.Check  # pyright: ignore[reportAttributeAccessIssue] - untyped package
        reply = self._unary(check, health_pb2.HealthCheckRequest(service=service))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Close the connection; running requests end."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error) from None


def _logprobs(reply: pb.LogProbs) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token_id, value, tuple(zip(top.token_ids, top.values, strict=True)))
        for token_id, value, top in zip(reply.token_ids, reply.token_logprobs, reply.top_logprobs, strict=True)
    )


def stays_here(target: str) -> bool:
    """Whether what is sent to `target` does not leave this machine."""
    return target.startswith("unix:") or is_loopback(target.rpartition(":")[0])


def _open_channel(target: str, ca: str | Path | None) -> grpc.Channel:
    # A proxy of the environment is no way to this machine, and would see a token sent in clear text.
    options = (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)) if stays_here(target) else _CHANNEL_OPTIONS
    if ca is None:
        return grpc.insecure_channel(target, options=options)
    try:
        credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes())
    except OSError as error:
        raise UserError.of("ca", ca, f"cannot be read: {error.strerror}") from error
    return grpc.secure_channel(target, credentials, options=options)


def _build(kind: type[_T], **fields: Any) -> _T:
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:  # protobuf's words for a value its field cannot carry
        raise UserError(f"{kind.__name__}: {error}") from None


def _input(prompt: str | Sequence[int]) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise UserError.of("prompt", f"of {type(prompt).__name__}", "must be text or a list of token ids")
    return {"tokenized": _build(pb.TokenizedInput, input_ids=_ids("prompt token id", prompt))}


def _ids(name: str, token_ids: Sequence[int]) -> Sequence[int]:
    """Return the ids when the wire can carry them; the server holds them to its vocabulary."""
    try:
        check_ids(name, token_ids, 1 << 32)
    except TypeError:
        raise UserError.of(name, f"in a {type(token_ids).__name__}", "must be a whole number") from None
    return token_ids


def _translate(error: grpc.RpcError, target: str, *, plain: bool) -> PregateError:
    """Return the typed error of a call's status; the sentence is the server's."""
    code, details = error.code().name, error.details() or "no details"  # pyright: ignore[reportAttributeAccessIssue]
    if code == "UNAUTHENTICATED":
        return UserError.of("token", "", details)
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:  # gRPC's words: trying again does not help
        return UserError(f"{target}: {details}")
    if code == "UNAVAILABLE" and plain and any(sign in details for sign in _SIGNS_OF_TLS):
        return UnavailableError(f"{target}: {details}; if the server speaks TLS, give ca, its certificate's PEM file")
    if code == "UNAVAILABLE" and not plain and "WRONG_VERSION_NUMBER" in details:
        return UnavailableError(f"{target}: {details}; if the server speaks no TLS, leave ca out")
    if code in BY_CODE and code != "INTERNAL":
        return BY_CODE[code](details)
    return PregateError(f"{target} answered {code}: {details}")

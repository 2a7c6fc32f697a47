"""`LoadOptions`: a load and where it goes; loads nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Needs, Texts, Word, options


@options()
class LoadOptions:
    """Requests of a `trace` (`arrival_s,prompt_tokens,output_tokens`), or `rate` of them a second at random."""

    target: Annotated[str, Field(description="HOST:PORT of a gRPC server, or an OpenAI one's http://HOST:PORT.")]
    trace: Annotated[Path | None, Field(description="CSV of arrival_s,prompt_tokens,output_tokens to replay.")] = None
    speed: Annotated[float, Field(gt=0, description="Arrivals of the trace come so many times as fast.")] = 1.0
    rate: Annotated[float | None, Field(gt=0, description="Requests a second, at random (Poisson).")] = None
    prompt_tokens: Annotated[int, Field(ge=1, description="Of each, with --rate.")] = 128
    output_tokens: Annotated[int, Field(ge=1, description="Of each, with --rate.")] = 64
    requests: Annotated[
        int | None, Field(ge=1, description="Requests at most."), Word("all of the trace, or 100", written=False)
    ] = None
    duration: Annotated[
        float | None, Field(gt=0, description="Seconds of arrivals at most."), Word("all", written=False)
    ] = None
    max_prompt: Annotated[
        int | None, Field(ge=1, description="Longer prompts are clipped."), Word("context", False)
    ] = None
    max_output: Annotated[
        int | None, Field(ge=1, description="Longer answers are clipped."), Word("context", False)
    ] = None
    context: Annotated[
        int | None,
        Field(ge=2, description="Tokens of prompt and answer together."),
        Word("the server's", written=False),
    ] = None
    text: Annotated[
        Texts, Field(description="Text that prompts are cut from; else they are random ids", min_length=0)
    ] = ()
    tokenizer: Annotated[
        Path | None, Field(description="Model folder whose tokenizer cuts --text."), Needs("model")
    ] = None
    vocab_size: Annotated[
        int | None, Field(ge=2, description="Random ids are below it."), Word("the server's, or 256", written=False)
    ] = None
    model: Annotated[str, Field(description="Name the server knows the model by.")] = ""
    token_file: Annotated[Path | None, Field(description="File with the server's bearer token.")] = None
    ca: Annotated[Path | None, Field(description="PEM file to check the server's TLS certificate with.")] = None
    timeout: Annotated[float, Field(gt=0, description="Deadline of each request, in seconds.")] = 120.0
    ttft_bound: Annotated[float, Field(gt=0, description="Good is a first token within so many seconds,")] = 1.0
    itl_bound: Annotated[float, Field(gt=0, description="and so many on average between the others.")] = 0.1
    seed: Annotated[int, Field(ge=0, description="Of arrivals and prompts.")] = 0
    picture: Annotated[Path | None, Field(description="PNG to draw to.")] = None

    def __post_init__(self) -> None:
        if (self.trace is None) == (self.rate is None):
            raise UserError("--trace, --rate: give one of them, a file of arrivals or requests a second")
        if self.trace is not None and not self.trace.is_file():
            raise UserError.of("--trace", self.trace, "no such file")
        if (not self.text) != (self.tokenizer is None):
            raise UserError("--text, --tokenizer: give both or neither")

    @property
    def kind(self) -> Literal["grpc", "openai"]:
        """What the target speaks."""
        return "openai" if self.target.startswith(("http://", "https://")) else "grpc"

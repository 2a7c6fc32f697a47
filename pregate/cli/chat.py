"""`pregate chat`: talk to a served model in a terminal, or through a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pregate.base.errors import PregateError
from pregate.base.options import Word, options
from pregate.base.sampling import MAX_SEED
from pregate.cli.flags import command
from pregate.cli.target import Patience, Target, open_client

if TYPE_CHECKING:
    from pregate.client.client import Client


@options()
class ChatOptions:
    """How the model answers."""

    system: Annotated[str | None, Field(description="What the model is told before the conversation.")] = None
    max_tokens: Annotated[
        int | None,
        Field(ge=1, description="Tokens of an answer at most."),
        Word("512, or what the context leaves", written=False),
    ] = None
    temperature: Annotated[float, Field(ge=0, description="0 is greedy.")] = 0.7
    top_p: Annotated[
        float, Field(gt=0, le=1, description="Sample from the likeliest tokens of this total probability.")
    ] = 1.0
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Makes answers repeatable.")] = None


@command(Target, Patience, ChatOptions)
def chat(target: Target, patience: Patience, options: ChatOptions) -> None:
    """Chat with a served model. Ctrl-C stops an answer, Ctrl-D leaves, /new begins anew. Piped lines are messages."""
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - `input` edits lines, and remembers them, once this is loaded
    with open_client(target.target, target, patience.retry_s) as client:
        messages = list(beginning)
        while (said := _next_message(interactive)) is not None:
            if said == "/new":
                messages = list(beginning)
            if not said or said == "/new":
                continue
            asked = [*messages, {"role": "user", "content": said}]
            try:
                messages = [*asked, {"role": "assistant", "content": _answer(client, asked, options)}]
            except PregateError as error:
                if not interactive:
                    raise
                print(f"\n({error})", file=sys.stderr)


def _next_message(interactive: bool) -> str | None:
    """The next line, None at the end; Ctrl-C takes a line back."""
    while True:
        try:
            return input("> " if interactive else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _answer(client: Client, messages: list[dict[str, str]], options: ChatOptions) -> str:
    """Print the answer as it comes; returns it, or as much as came before Ctrl-C."""
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    text = ""
    with client.chat(messages, options.max_tokens, **sampling) as call:
        try:
            for chunk in call:
                text += chunk.text
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            call.cancel()
            print(" (stopped)", end="")
    if call.completion is not None and call.completion.finish_reason == "length":
        print(f" (cut at {call.completion.completion_tokens} tokens)", end="")
    print(flush=True)
    return text

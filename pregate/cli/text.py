"""`pregate generate` and `pregate route`: from a checkpoint in this process, or from a server."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from pregate.base.errors import UserError
from pregate.base.options import Adapter, Needs, Word, check_adapter, follow_adapter, options
from pregate.base.sampling import DEFAULT_MAX_TOKENS, MAX_SEED, MAX_TEMPERATURE, check_stop_strings, most_tokens
from pregate.cli.flags import command
from pregate.cli.printed import Output, loading
from pregate.cli.target import SERVERS, Credentials, Patience, open_client

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from pregate.base.choices import Kind
    from pregate.client.client import Client
    from pregate.convert.progress import Progress
    from pregate.model.folder import ModelFolder
    from pregate.router.doors.completion_text import CompletionText
    from pregate.router.link.messages import SamplingParams


@options(kw_only=True)
class Source(Credentials):
    """Where the model runs: a checkpoint folder in this process, or a server."""

    model: Annotated[Path | None, Field(description="Checkpoint, run in this process."), Needs("model")] = None
    adapter: Adapter = None
    parent: Annotated[Path | None, Field(description="The dense model of --adapter."), Needs("model")] = None
    target: Annotated[str | None, Field(description=SERVERS)] = None

    follow = staticmethod(follow_adapter)

    def __post_init__(self) -> None:
        check_adapter(self.model, self.adapter, self.parent)
        if self.parent is not None and self.adapter is None:
            raise UserError.of("--parent", self.parent, "needs --adapter")
        if (self.model is None) == (self.target is None):
            raise UserError("--model, --target: give one of them, a checkpoint folder or the HOST:PORT of a server")


@options()
class Prompt:
    """What to go on from."""

    prompt: Annotated[str, Field(description="The text to go on from.")]


@options()
class Sampling:
    """How to pick tokens."""

    max_tokens: Annotated[
        int | None,
        Field(ge=1, description="New tokens at most."),
        Word(f"{DEFAULT_MAX_TOKENS}, or what the context leaves", written=False),
    ] = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, description="0 is greedy.")] = 0.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="Sample from the likeliest tokens of this total probability.")
    ] = 1.0
    top_k: Annotated[int, Field(ge=0, description="Sample from that many likeliest tokens; 0 from all.")] = 0
    min_p: Annotated[
        float, Field(ge=0, le=1, description="Sample from tokens with that share of the likeliest's probability.")
    ] = 0.0
    repetition_penalty: Annotated[
        float | None,
        Field(gt=0, description="Above 1 makes tokens that were there unlikelier."),
        Word("the model's own", written=False),
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="Makes sampling repeatable.")] = None
    min_tokens: Annotated[int, Field(ge=0, description="New tokens at least.")] = 0
    stop: Annotated[tuple[str, ...], Field(description="Texts before the first of which it ends.")] = ()

    def __post_init__(self) -> None:
        check_stop_strings(self.stop)


@command(Prompt, Source, Patience, Sampling, Output)
def generate(prompt: Prompt, source: Source, patience: Patience, sampling: Sampling, output: Output) -> None:
    """Continue a text. With --target it streams from a server; with --model the reference model runs here."""
    if source.target is not None:
        with open_client(source.target, source, patience.retry_s) as client:
            _generate_served(client, prompt.prompt, sampling, output)
        return
    result = _generate_here(source, prompt.prompt, sampling)
    typer.echo(json.dumps(result) if output.json else result["text"])


@command(Prompt, Source, Patience, Output)
def route(prompt: Prompt, source: Source, patience: Patience, output: Output) -> None:
    """Print the experts each token of a text will visit in every layer, without running the model."""
    if source.target is not None:
        with open_client(source.target, source, patience.retry_s) as client:
            result = asdict(client.route(prompt.prompt))
    else:
        result = _route_here(source, prompt.prompt)
    if output.json:
        typer.echo(json.dumps(result))
    else:
        _print_route(result)


# ---- a server ----


def _generate_served(client: Client, prompt: str, sampling: Sampling, output: Output) -> None:
    with client.generate(prompt, **asdict(sampling)) as generation:
        for chunk in generation:
            if not output.json:
                typer.echo(chunk.text, nl=False)
    if output.json:
        assert generation.completion is not None
        typer.echo(json.dumps(asdict(generation.completion)))
    else:
        typer.echo()


# ---- this process ----


def _generate_here(source: Source, prompt: str, sampling: Sampling) -> dict[str, Any]:
    folder, tokenizer, encoding = _read(source, prompt, "routed")
    ids = encoding.ids
    _check_length(ids, folder.context_tokens)  # of a few models more than what they can be run with
    model, progress = _load(folder)
    from pregate.router.doors.completion_text import CompletionText
    from pregate.router.doors.token_texts import TokenTexts
    from pregate.router.link.messages import FinishedEvent, SubmitRequest

    context = model.config.context_tokens
    _check_length(ids, context)
    max_tokens = most_tokens(
        sampling.max_tokens or DEFAULT_MAX_TOKENS, len(ids), context, cut=sampling.max_tokens is None
    )
    params = _params(sampling, max_tokens)
    asked, stops = SubmitRequest("", tuple(ids), params), (*sampling.stop, *folder.stop_strings)
    text = CompletionText(TokenTexts(tokenizer), asked, stops, 0)
    with progress.doing("generating"):
        new_ids = _new_ids(model, ids, _picking(sampling, params), text, folder.eos_ids)
    end = FinishedEvent("", "stop" if new_ids[-1] in folder.eos_ids else "length", len(ids), len(new_ids), ())
    if not text.stopped:
        text.flush()
    done = asdict(text.completion("", None if text.stopped else end))
    return {name: done[name] for name in ("text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens")}


def _params(sampling: Sampling, max_tokens: int) -> SamplingParams:
    from pregate.router.link.messages import SamplingParams

    return SamplingParams(
        max_tokens, sampling.temperature, sampling.top_p, top_k=sampling.top_k, min_p=sampling.min_p,
        min_tokens=sampling.min_tokens,
    )  # fmt: skip


def _picking(sampling: Sampling, params: SamplingParams) -> dict[str, Any]:
    """How transformers is to pick tokens. It draws as an engine draws: with a seed it is the same text."""
    from transformers import LogitsProcessorList

    from pregate.router.engine.sampling import scores

    picking: dict[str, Any] = {"do_sample": False, "max_new_tokens": params.max_tokens}
    if sampling.temperature:
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        picking["logits_processor"] = LogitsProcessorList(
            [lambda ids_BN, logits_BV: scores(logits_BV[0], params, seed, ids_BN.shape[1])[None]]
        )
    if sampling.repetition_penalty is not None:
        picking["repetition_penalty"] = sampling.repetition_penalty
    if sampling.min_tokens:
        picking["min_new_tokens"] = sampling.min_tokens
    return picking


def _new_ids(
    model: Any, ids: list[int], picking: dict[str, Any], text: CompletionText, eos_ids: Collection[int]
) -> list[int]:
    """Generate until an end or until `text`, which is given what comes, has met a stop string."""
    import torch
    from transformers import StoppingCriteriaList

    from pregate.router.link.messages import TokensEvent

    def ended(ids_BN: torch.Tensor, _scores: object) -> torch.Tensor:
        token_id = int(ids_BN[0, -1])
        if token_id not in eos_ids:
            text.push(TokensEvent("", (token_id,)))
        return torch.tensor([text.stopped])

    ids_BN, criteria = torch.tensor([ids]), StoppingCriteriaList([ended])
    one = {"attention_mask": torch.ones_like(ids_BN), "pad_token_id": 0}  # one sequence: nothing is padded
    return model.generate(ids_BN, **one, stopping_criteria=criteria, **picking)[0].tolist()[len(ids) :]


def _read(source: Source, prompt: str, kind: Kind) -> tuple[ModelFolder, Tokenizer, Encoding]:
    """The folder, its tokenizer, and the prompt's tokens; all that can be refused before torch is loaded."""
    from pregate.model.folder import read_folder
    from pregate.model.tokenizer import check_ids, read_tokenizer, text_bytes

    assert source.model is not None
    folder = read_folder(source.model, parent=source.parent)
    tokenizer = read_tokenizer(folder.text_path)
    text_bytes(prompt, "--prompt")
    folder.check(kind)
    encoding = tokenizer.encode(prompt)
    check_ids(encoding, prompt, folder.vocab_size, "--prompt", f"of {len(encoding.ids)} tokens")
    for note in folder.notes:
        typer.echo(f"pregate: {folder.path}: {note}", err=True)
    return folder, tokenizer, encoding


def _check_length(ids: list[int], context_tokens: int) -> None:
    if not 0 < len(ids) < context_tokens:
        raise UserError.of("--prompt", f"of {len(ids)} tokens", f"allowed: 1 to {context_tokens - 1} tokens")


def _load(folder: ModelFolder) -> tuple[Any, Progress]:
    """The reference model, and what to tell of its work by."""
    with loading() as progress:
        import torch

        from pregate.model.modeling import RoutedForCausalLM
    with progress.doing(f"loading {folder.path.name}"):
        model = RoutedForCausalLM.from_pretrained(folder.path, parent=folder.parent, dtype=torch.float32)
    return model.eval(), progress


def _route_here(source: Source, prompt: str) -> dict[str, Any]:
    folder, _tokenizer, encoding = _read(source, prompt, "path router")
    model, _progress = _load(folder)
    paths = model.paths(encoding.ids)
    ids = [[[int(e) for e in layer if e >= 0] for layer in token] for token in paths.ids]
    exact = model.config.routing == "path"
    return {"token_ids": encoding.ids, "tokens": encoding.tokens, "paths": ids, "exact": exact}


def _print_route(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    kind = "exact: these are the routing" if result["exact"] else "predicted: the gates decide"
    table = Table("token", title=f"routed experts of each layer ({kind})", box=None)
    for layer in range(len(result["paths"][0]) if result["paths"] else 0):
        table.add_column(str(layer))
    for token, layers in zip(result["tokens"], result["paths"], strict=True):
        table.add_row(Text(repr(token)), *(" ".join(map(str, experts)) or "-" for experts in layers))
    Console().print(table)

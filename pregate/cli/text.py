"""`pregate generate` and `pregate route`: from a checkpoint in this process, or from a server."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pregate.base.errors import UserError, option_name
from pregate.base.sampling import check_sampling
from pregate.base.tokens import read_tokens

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from pregate.client.client import Client
    from pregate.model.folder import ModelFolder

ModelOption = Annotated[Path | None, typer.Option("--model", help="Checkpoint, run in this process.")]
TargetOption = Annotated[str | None, typer.Option("--target", help="HOST:PORT of a server.")]
PromptOption = Annotated[str, typer.Option("--prompt", help="The text to go on from.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TokenOption = Annotated[Path | None, typer.Option("--token-file", help="File with the server's bearer token.")]
CaOption = Annotated[Path | None, typer.Option("--ca", help="PEM file to check the server's TLS certificate with.")]


@dataclass(frozen=True)
class Sampling:
    """How to pick tokens in this process; a server checks its own requests."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None

    def __post_init__(self) -> None:
        check_sampling(self.max_tokens, self.temperature, self.top_p, self.seed, option_name)


def generate(
    prompt: PromptOption,
    model: ModelOption = None,
    target: TargetOption = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    as_json: JsonOption = False,
    token_file: TokenOption = None,
    ca: CaOption = None,
) -> None:
    """Continue a text. With --target it streams from a server; with --model the reference model runs here."""
    _check_source(model, target)
    if target is not None:
        with ExitStack() as stack:
            client = stack.enter_context(_client(target, token_file, ca))
            _generate_served(client, prompt, as_json, max_tokens, temperature, top_p, seed)
        return
    assert model is not None
    result = _generate_here(model, prompt, Sampling(max_tokens, temperature, top_p, seed))
    typer.echo(json.dumps(result) if as_json else result["text"])


def route(
    prompt: PromptOption,
    model: ModelOption = None,
    target: TargetOption = None,
    as_json: JsonOption = False,
    token_file: TokenOption = None,
    ca: CaOption = None,
) -> None:
    """Print the experts each token of a text will visit in every layer, without running the model."""
    _check_source(model, target)
    if target is not None:
        with _client(target, token_file, ca) as client:
            result = asdict(client.route(prompt))
    else:
        assert model is not None
        result = _route_here(model, prompt)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print_route(result)


def _check_source(model: Path | None, target: str | None) -> None:
    if (model is None) == (target is None):
        raise UserError("--model, --target: give one of them, a checkpoint folder or the HOST:PORT of a server")


# ---- a server ----


def _client(target: str, token_file: Path | None, ca: Path | None) -> Client:
    from pregate.client.client import Client

    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError.of("--target", target, "must be HOST:PORT")
    token = read_tokens(token_file)[0] if token_file else None
    return Client(target, token, ca)


def _generate_served(
    client: Client,
    prompt: str,
    as_json: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
) -> None:
    with client.generate(prompt, max_tokens, temperature=temperature, top_p=top_p, seed=seed) as generation:
        for chunk in generation:
            if not as_json:
                typer.echo(chunk.text, nl=False)
    if as_json:
        assert generation.completion is not None
        typer.echo(json.dumps(asdict(generation.completion)))
    else:
        typer.echo()


# ---- this process ----


def _generate_here(path: Path, prompt: str, sampling: Sampling) -> dict[str, Any]:
    import torch

    folder, tokenizer, encoding = _read(path, prompt)
    ids = encoding.ids
    model = _load(path)
    context = model.config.context_tokens
    if not 0 < len(ids) < context:
        raise UserError.of("--prompt", f"of {len(ids)} tokens", f"allowed: 1 to {context - 1} tokens")
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    picking = {"do_sample": False}
    if sampling.temperature:
        picking = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ids_BN = torch.tensor([ids])
    output = model.generate(
        ids_BN,
        attention_mask=torch.ones_like(ids_BN),
        max_new_tokens=min(sampling.max_tokens, context - len(ids)),
        pad_token_id=0,  # one sequence: nothing is padded
        **picking,
    )[0].tolist()
    return _completion(tokenizer, ids, output[len(ids) :], folder.eos_ids)


def _read(path: Path, prompt: str) -> tuple[ModelFolder, Tokenizer, Encoding]:
    """The folder, its tokenizer, and the prompt's tokens; all that can be refused before the model is loaded."""
    from pregate.model.folder import read_folder
    from pregate.model.tokenizer import check_ids, read_tokenizer

    if not path.is_dir():
        raise UserError.of("--model", path, "no such folder; allowed: a checkpoint folder")
    folder, tokenizer = read_folder(path), read_tokenizer(path)
    encoding = tokenizer.encode(prompt)
    check_ids(encoding, prompt, folder.vocab_size, "--prompt", f"of {len(encoding.ids)} tokens")
    for note in folder.notes:
        typer.echo(f"pregate: {path}: {note}", err=True)
    return folder, tokenizer, encoding


def _load(path: Path) -> Any:
    import torch

    from pregate.model.modeling import RoutedForCausalLM
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    return RoutedForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _completion(tokenizer: Any, prompt_ids: list[int], new_ids: list[int], eos_ids: Collection[int]) -> dict[str, Any]:
    """The same fields as a served completion; an end-of-text token is counted and not shown."""
    stopped = bool(new_ids) and new_ids[-1] in eos_ids
    shown = new_ids[:-1] if stopped else new_ids
    return {
        "text": tokenizer.decode(prompt_ids + shown)[len(tokenizer.decode(prompt_ids)) :],
        "token_ids": shown,
        "finish_reason": "stop" if stopped else "length",
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(new_ids),
    }


def _route_here(path: Path, prompt: str) -> dict[str, Any]:
    _folder, _tokenizer, encoding = _read(path, prompt)
    model = _load(path)
    paths = model.paths(encoding.ids)
    ids = [[[int(e) for e in layer if e >= 0] for layer in token] for token in paths.ids]
    exact = model.config.routing == "path"
    return {"token_ids": encoding.ids, "tokens": encoding.tokens, "paths": ids, "exact": exact}


def _print_route(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    kind = "exact: these are the routing" if result["exact"] else "predicted: the gates decide"
    table = Table("token", title=f"routed experts of each layer ({kind})", box=None)
    for layer in range(len(result["paths"][0]) if result["paths"] else 0):
        table.add_column(str(layer))
    for token, layers in zip(result["tokens"], result["paths"], strict=True):
        table.add_row(repr(token), *(" ".join(map(str, experts)) or "-" for experts in layers))
    Console().print(table)

"""`pregate bench serve`: from options to a printed table."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pregate.base.errors import UserError
from pregate.base.tokens import read_tokens
from pregate.cli.load import arrivals as load
from pregate.cli.load.options import LoadOptions
from pregate.cli.load.outcome import Outcome, figures
from pregate.cli.load.run import of_server, send
from pregate.cli.load.targets import opened

#: Ids below are often special: beginnings, ends, unknown.
_FIRST_ID = 3
#: Prompts are cut from so many tokens of the texts together.
_POOL_TOKENS = 1 << 20


def run(options: LoadOptions, *, as_json: bool) -> None:
    """Send the load and print what came of it."""
    outcomes, result = asyncio.run(_measure(options))
    if options.picture is not None:
        from pregate.cli.load.picture import draw

        draw(outcomes, options.picture, options.target)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        _print(result)


async def _measure(options: LoadOptions) -> tuple[list[Outcome], dict[str, Any]]:
    token = read_tokens(options.token_file)[0] if options.token_file else None
    async with opened(options.target, options.kind, options.model, token, options.ca) as target:
        before = await target.info()
        due, num_clipped = _arrivals(options, before.get("max_context_length"))
        prompts = _prompts(options, due, before.get("vocab_size") or 256)
        with _bar(len(due)) as ended:
            outcomes = await send(target, due, prompts, options.timeout, ended)
        server = of_server(before, await target.info())
    span_s = due[-1].arrival_s
    result: dict[str, Any] = {
        "target": options.target,
        "load": str(options.trace or f"{options.rate:g} requests/s at random"),
        "offered_requests_per_s": round((len(due) - 1) / span_s, 3) if span_s else None,
        "clipped_requests": num_clipped,
        "mean_prompt_tokens": round(sum(a.prompt_tokens for a in due) / len(due), 1),
        "mean_output_tokens": round(sum(a.output_tokens for a in due) / len(due), 1),
        **figures(outcomes, options.ttft_bound, options.itl_bound),
        "server": server,
    }
    return outcomes, result


def _arrivals(options: LoadOptions, context: int | None) -> tuple[list[load.Arrival], int]:
    if options.trace is not None:
        coming, requests = load.read_trace(options.trace, options.speed), options.requests
    else:
        assert options.rate is not None
        coming = load.poisson(options.rate, options.prompt_tokens, options.output_tokens, options.seed)
        requests = options.requests or (None if options.duration else 100)
    due = load.first_of(coming, requests, options.duration)
    return load.clipped(due, options.context or context, options.max_prompt, options.max_output)


def _prompts(options: LoadOptions, due: Sequence[load.Arrival], vocab_size: int) -> list[list[int]]:
    """Prompts of the lengths that are due: pieces of the texts, of none more than its share, or random ids."""
    rng = random.Random(options.seed)
    if options.tokenizer is None:
        last = (options.vocab_size or vocab_size) - 1
        return [[rng.randint(min(_FIRST_ID, last), last) for _ in range(a.prompt_tokens)] for a in due]
    from pregate.convert.text.documents import read_documents
    from pregate.model.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(options.tokenizer)
    ids: list[int] = []
    for text in options.text:
        some: list[int] = []
        for document in read_documents([text], 1 << 12, "--text"):
            some += tokenizer.encode(document.text, add_special_tokens=False).ids
            if len(some) > _POOL_TOKENS // len(options.text):
                break
        ids += some
    longest = max(a.prompt_tokens for a in due)
    if len(ids) < longest:
        raise UserError.of("--text", options.text[0], f"of {len(ids)} tokens: the longest prompt has {longest}")
    starts = [rng.randrange(len(ids) - a.prompt_tokens + 1) for a in due]
    return [ids[start : start + a.prompt_tokens] for start, a in zip(starts, due, strict=True)]


@contextmanager
def _bar(num_requests: int) -> Iterator[Any]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task, num_failed = progress.add_task("requests", total=num_requests), 0

        def ended(outcome: Outcome) -> None:
            nonlocal num_failed
            num_failed += bool(outcome.error)
            shown = f"requests, {num_failed} without an answer" if num_failed else "requests"
            progress.update(task, advance=1, description=shown)

        yield ended


def _print(result: dict[str, Any]) -> None:
    times = {name: value for name, value in result.items() if name.endswith("_ms")}
    table = Table("ms", "mean", "p50", "p95", "p99", box=None)
    for name, values in times.items():
        shown = [f"{values[q]:.1f}" if q in values else "-" for q in ("mean", "p50", "p95", "p99")]
        table.add_row(name.removesuffix("_ms").replace("_", " "), *shown)
    for name, value in result.items():
        if name in times or value in (None, {}):
            continue
        parts = value.items() if isinstance(value, dict) else ()
        shown = ", ".join(f"{key.replace('_', ' ')} {number}" for key, number in parts) or value
        typer.echo(f"{name.replace('_', ' '):<26} {shown}")
    Console().print(table)

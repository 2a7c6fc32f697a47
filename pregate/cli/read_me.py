"""`pregate read-me`: a dense model as domain experts with one index for all layers (Read-ME)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pregate.cli.model import ModelOption, OutOption, SeedOption, TextFieldOption, interrupted


def read_me(
    model: ModelOption,
    out: OutOption,
    domain: Annotated[
        list[Path], typer.Option(help="Text of one domain, a file or folder; 2 or more.", show_default=False)
    ],
    active_share: Annotated[float, typer.Option(help="Share of each FFN's channels in an expert.")] = 0.5,
    permanent: Annotated[
        str, typer.Option(help="What all domains use: fused (in every expert) or separate (a shared expert).")
    ] = "fused",
    score: Annotated[str, typer.Option(help="activation (Read-ME), or contribution: times the down column.")] = (
        "activation"
    ),
    samples: Annotated[int, typer.Option(help="Windows of each domain that channels are scored on.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window or document, at most.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Rounds of router training and tuning.")] = 8,
    router_steps: Annotated[int, typer.Option(help="Steps of the router in a round.")] = 100,
    steps: Annotated[int, typer.Option(help="Steps of the experts in a round; 0: none.")] = 200,
    router_batch: Annotated[int, typer.Option(help="Full sequences of a router's step.")] = 64,
    batch: Annotated[int, typer.Option(help="Full sequences of an experts' step.")] = 128,
    router_learning_rate: Annotated[float, typer.Option(help="The router's, in the first round.")] = 5e-4,
    learning_rate: Annotated[float, typer.Option(help="Everything else's, in the first round.")] = 5e-5,
    decay: Annotated[float, typer.Option(help="Of learning rates, from round to round.")] = 0.8,
    weight_decay: Annotated[float, typer.Option(help="Of both optimizers.")] = 0.01,
    target: Annotated[
        str, typer.Option(help="What the router learns: overlap (Read-ME) with strong channels, or contribution.")
    ] = "overlap",
    loss: Annotated[str, typer.Option(help="How it learns it: paper (Read-ME), mass or captured.")] = "paper",
    kl_share: Annotated[float, typer.Option(help="Share of the loss that is divergence from the parent.")] = 0.0,
    tie_overlap: Annotated[bool, typer.Option(help="A row that several experts hold stays one weight.")] = True,
    pool_tokens: Annotated[int, typer.Option(help="Tokens of text to train on, at most.")] = 2_000_000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step in memory at a time.")] = 8192,
    dim: Annotated[int, typer.Option(help="Width of the path router.")] = 512,
    blocks: Annotated[int, typer.Option(help="Blocks of the path router.")] = 1,
    seed: SeedOption = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16, as stored.")] = "float32",
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu, cuda or cuda:N.")] = "auto",
    text_field: TextFieldOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
) -> None:
    """One expert per domain, one index per token for all layers, tuned in rounds; goes on after a whole stage."""
    given: dict[str, Any] = {name: value for name, value in locals().items() if name != "domain"}
    from pregate.convert.domains.options import ReadMeOptions
    from pregate.convert.domains.run import read_me as run
    from pregate.convert.progress import RichProgress
    from pregate.model.quiet import quiet_transformers

    quiet_transformers()
    options = ReadMeOptions(domains=tuple(domain), **given)
    try:
        manifest = run(options, RichProgress())
    except KeyboardInterrupt:
        typer.echo(f"pregate: {interrupted(out)}", err=True)
        raise typer.Exit(130) from None
    print_figures(manifest.figures)
    typer.echo(f"written: {out}")


def print_figures(figures: dict[str, Any]) -> None:
    """Perplexities by domain, which expert each domain's text visits, and what a swap of experts costs."""
    typer.echo(f"{'domain':<20}{'dense':>10}{'routed':>10}   share of tokens by expert, in this order")
    for row in [*figures["by_domain"], {"name": "all", "expert_share": []} | figures]:
        shares = "  ".join(f"{share:.2f}" for share in row["expert_share"])
        typer.echo(
            f"{row['name']:<20}{row['dense_perplexity']:>10.2f}{row['routed_perplexity']:>10.2f}   {shares}".rstrip()
        )
    print_swap(figures)


def print_swap(figures: dict[str, Any]) -> None:
    """Active share, coverage, and the bytes a swap of one index for another moves in all layers."""
    swap, covered, repeats = figures["swap"], figures["coverage"], figures["repeats_last_expert"]
    kept = f"channels kept {min(covered):.2f} to {max(covered):.2f} by layer"
    saved = f"{swap['mean_differing_bytes']:,} on average, {100 * swap['saved_share']:.0f} % less"
    lines = [
        f"active share {figures['active_share']:.3f}, {kept}, tokens that keep the last expert {repeats:.2f}",
        f"swap of one expert in all layers: {swap['full_bytes']:,} bytes; only rows that differ: {saved}",
        "bytes by pair (row: the new expert, column: the old one)",
    ]
    lines += ["  " + "".join(f"{value:>14,}" for value in row) for row in swap["differing_bytes"]]
    typer.echo("\n".join(lines))

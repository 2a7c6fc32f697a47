"""`pregate read-me`: a dense model as domain experts with one index for all layers (Read-ME)."""

from __future__ import annotations

from typing import Any

import typer

from pregate.cli.flags import command
from pregate.cli.printed import loading, say_if_interrupted
from pregate.convert.domains.options import ReadMeOptions


@command(ReadMeOptions)
def read_me(options: ReadMeOptions) -> None:
    """One expert per domain, one index per token for all layers, tuned in rounds; goes on after a whole stage."""
    with loading() as progress:
        from pregate.convert.domains.run import read_me as run
        from pregate.convert.files.partial import interrupted
    with say_if_interrupted(interrupted, options.out):
        manifest = run(options, progress)
    print_figures(manifest.figures)
    typer.echo(f"written: {options.out}")


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

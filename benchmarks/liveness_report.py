"""Tables of `benchmarks.liveness`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.surroundings import sentence

TIMES = ("client", "health", "screen", "exit", "serves again")


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write the Markdown tables beside `out`."""
    lines = ["# What a deployment bears, and how soon a death is seen", "", f"{sentence(results)}.", ""]
    lines += _bears(results["bears"]) + _kills(results["kills"]) + _starts(results["starts"])
    lines += [f"Left behind by all of these deployments together (processes, files, shared memory): {results['left']}."]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _bears(found: dict[str, Any]) -> list[str]:
    lines = [
        "**What no request may fail by.** Health is asked ten times a second, each time over a new connection.",
        "",
        "| what | requests | failed | tokens | seconds | longest step (busy since) | health | slowest answer of it |",
        "| --- | --: | --: | --: | --: | --: | --- | --: |",
    ]
    for what, row in found.items():
        health = ", ".join(f"{count} {answer}" for answer, count in row["health"].items())
        lines.append(
            f"| {what} | {row['requests']} | {len(row['failed'])} | {row['tokens']} | {row['seconds']:.0f}"
            f" | {row['longest_step_s']:.1f} s | {health} | {row['longest_health_answer_s']:.1f} s |"
        )
    return [*lines, ""]


def _kills(found: list[dict[str, Any]]) -> list[str]:
    heads = "client's call ends | health is not SERVING | the screen says which | the launcher has ended | serves again"
    lines = [
        "**`kill -9`, seconds until it is seen,** each in a deployment of its own, on two hosts, with a running",
        "request. A door is started again; with any other part the launcher ends.",
        "",
        f"| killed | busy processes beside | {heads} |",
        "| --- | --: | " + "--: | " * len(TIMES),
    ]
    for row in found:
        cells = [f"{row['seconds'][time]:.1f}" if time in row["seconds"] else "" for time in TIMES]
        lines.append(f"| {row['role']} | {row['busy']} | " + " | ".join(cells) + " |")
    lines += ["", "What was said:", ""]
    lines += [f"- {row['role']}: the client `{row['client']}`, the screen `{row['screen'].strip()}`" for row in found]
    return [*lines, ""]


def _starts(found: dict[str, Any]) -> list[str]:
    lines = ["**Start-up,** seconds to the first token and, by stage, when it began:", ""]
    for name, row in found.items():
        stages = ", ".join(f"{stage} {second:.1f}" for stage, second in row["stages"].items())
        lines.append(f"- {name}: {row['first_token_s']:.1f} s. {stages}.")
    return [*lines, ""]

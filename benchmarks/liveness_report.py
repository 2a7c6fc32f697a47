"""Tables of `benchmarks.liveness`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.surroundings import sentence


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
    lines = [
        "**`kill -9`, seconds until it is seen,** each in a deployment of its own, on two hosts, with a running",
        "request. What was killed is started again meanwhile.",
        "",
        "| killed | busy processes beside | the screen says which | another request is served | the running one |",
        "| --- | --: | --: | --: | --- |",
    ]
    for row in found:
        said, served, ended = (row["seconds"][time] for time in ("screen", "served", "ended"))
        how = "complete" if row["client"] is None else f"`{row['client']}`"
        lines.append(f"| {row['role']} | {row['busy']} | {said:.1f} | {served:.1f} | after {ended:.1f} s: {how} |")
    lines += ["", "What the screen said:", ""]
    lines += [f"- {row['role']}: `{row['screen'].strip()}`" for row in found]
    return [*lines, ""]


def _starts(found: dict[str, Any]) -> list[str]:
    lines = ["**Start-up,** seconds to the first token and, by stage, when it began:", ""]
    for name, row in found.items():
        stages = ", ".join(f"{stage} {second:.1f}" for stage, second in row["stages"].items())
        lines.append(f"- {name}: {row['first_token_s']:.1f} s. {stages}.")
    return [*lines, ""]

"""The page and the picture of benchmarks/scale.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.surroundings import sentence


def markdown(made: dict[str, Any]) -> str:
    args, costs = made["arguments"], made["costs"]
    lines = [
        "# Many hosts, simulated",
        "",
        f"{sentence(made['around'])}.",
        "",
        "Times of scheduling, choosing and planning are real, seconds of one thread's processor beside other work:",
        "medians, and the least in brackets. Hosts are simulated: an expert of {} x {} ({:.1f} MB, fp32) takes".format(
            *costs["shape"], costs["unit_bytes"] / 1e6
        ),
        f"{costs['unit_s'] * 1e6:.0f} us to read and {costs['row_s'] * 1e6:.1f} us a row (measured here, one thread),"
        f" {costs['unit_bytes'] * costs['load_byte_s'] * 1e3:.2f} ms to load from a cached",
        f"file, and a layer its slowest host and {costs['round_trip_s'] * 1e3:.3f} ms (`dispatch.json`, one host,"
        " idle). Tokens/s are what such",
        "hosts would do if nothing else took time: no attention, no sampling, no planning. Paths are Zipf's.",
        "",
        "## Skewed load",
        "",
        f"16 layers of 64 experts, {args['spare']:.0%} spare memory, {args['steps']} steps of each kind. Rows, and",
        "time, of a layer's slowest host over its hosts' mean, step by step; rows of the busiest host in all layers",
        "and steps over the mean.",
        "",
        "| experts a token | tokens a step | hosts | placement | rows | time | rows in all | tokens/s | choosing, ms |",
        "| --: | --: | --: | --- | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {r['experts_a_token']} | {r['step_tokens']} | {r['hosts']} | {r['way']} | {r['rows_of_a_layer']:.2f} |"
        f" {r['time_of_a_layer']:.2f} | {r['rows_in_all']:.2f} | {r['tokens_per_s']:,.0f} | {r['choose_ms']:.2f} |"
        for r in made["skewed"]
    ]
    lines += [
        "",
        "Homes: copies are there, each unit is served by its home. Chosen: each unit whole, by one of its copies, in",
        "every step. Shared: its rows part where that is faster. A step of few tokens cannot be even: it has a few",
        "rows a host, and a unit read by two hosts is read twice.",
        "",
        "## 1 to 1,000 hosts",
        "",
        f"{args['layers']} layers of {args['experts']} experts, {args['k']} a token; {args['requests']:,} requests at a"
        f" time, steps of {args['step_tokens']} tokens,",
        f"balanced with {args['spare']:.0%} copies, shared; {args['steps']} steps each. Milliseconds a step; messages",
        "and groups are the objects made of the plan, for every host that is asked and for every group of rows. Look",
        "ahead: for all requests, where hosts want it.",
        "",
        "| hosts | schedule | choose | plan | messages | groups | lookahead | tokens/s | linear | time | rows in all |",
        "| --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in made["scaled"]:
        ms = [
            f"{r['ms'][name]['median']:.2f} ({r['ms'][name]['least']:.2f})"
            for name in ("schedule", "choose", "plan", "messages", "groups", "lookahead")
        ]
        lines.append(
            f"| {r['hosts']:,} | {' | '.join(ms)} | {r['tokens_per_s']:,.0f} | {r['tokens_per_s_linear']:,.0f} |"
            f" {r['time_of_a_layer']:.2f} | {r['rows_in_all']:.2f} |"
        )
    lines += [
        "",
        "## A hundredth of the hosts lost",
        "",
        "One host at least. Units without a copy left go to survivors, which load them when they are asked for. How",
        "long a step is, in steps before the loss:",
        "",
        "| hosts | lost | units without a copy | MB to load | a step after | the first, with its loads |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {r['hosts']:,} | {r['lost']} | {r['lost_units']:,} | {r['lost_mb']:,.0f} | {r['step_after_loss']:.2f} |"
        f" {r['first_step_after_loss']:.2f} |"
        for r in made["scaled"]
        if r["lost"]
    ]
    steps = ", ".join(f"{r['slowest_over_mean']:.3f} after {r['units_loaded']}" for r in made["rebalanced"])
    lines += [
        "",
        "## Rebalancing",
        "",
        "The 64 most popular paths change their ranks (16 layers of 64 experts, 8 hosts); 16 units are loaded at a",
        f"time, until less than 2 % is to be gained. Slowest hosts' load over the mean: {steps} units.",
        "",
    ]
    return "\n".join(lines)


def draw(made: dict[str, Any], file: Path) -> None:
    """Planning, tokens/s and the loss of hosts against the number of hosts."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = made["scaled"]
    hosts = [r["hosts"] for r in rows]
    figure, (plan, speed, lost) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name in ("plan", "choose", "schedule", "messages", "groups"):
        plan.plot(hosts, [r["ms"][name]["median"] for r in rows], marker="o", markersize=3, label=name)
    plan.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    plan.set(title="Engine's work for a step, real", ylabel="ms, median", yscale="log")
    for name, label in (("tokens_per_s", "balanced, copies, shared"), ("tokens_per_s_linear", "linear")):
        speed.plot(hosts, [r[name] for r in rows], marker="o", markersize=3, label=label)
    speed.set(title="Hosts' throughput, simulated", ylabel="tokens/s", yscale="log")
    some = [r for r in rows if r["lost"]]
    for name, label in (("step_after_loss", "afterwards"), ("first_step_after_loss", "first, with loads")):
        lost.plot([r["hosts"] for r in some], [r[name] for r in some], marker="o", markersize=3, label=label)
    lost.set(title="A step after 1 % of hosts is lost", ylabel="steps before the loss", ylim=(0, None))
    for axes in (plan, speed, lost):
        axes.set(xscale="log", xlabel="hosts")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)

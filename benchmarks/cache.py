"""How near to the optimum each caching policy comes, on requests of a real trace over a checkpoint's exact paths.

    python -m benchmarks.cache --shared-folder ../shared [--paths CHECKPOINT ...]

(a) Read-ME's setting: seven domain experts of stories3M with one index for all layers (`pregate read-me` without
tuning: the six text folders, fiction in two halves by author), 2 to 5 of 7 experts held: whole ones, as
Read-ME counts, or as many units (one expert of one layer), as hosts do. (b) Checkpoints with a
path of their own in every layer: stories3M, converted and decoupled here, and every `--paths`; 25, 50 and 75 % of their
units held. Arrivals and lengths are the Azure conversation trace's, lengths scaled and cut to the model's context;
prompts and answers are pieces of all six text folders, drawn with three seeds. Writes results/cache.json, .md, .png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.surroundings import sentence, surroundings
from pregate.cli.cache.record import Pace, record, requests_of
from pregate.cli.cache.recording import Recording
from pregate.cli.cache.results import Row, draw, replay_all
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.run import read_me
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import RichProgress
from pregate.model.quiet import quiet_transformers

FOLDERS = ("stories", "fiction", "nonfiction", "verse", "math", "wiki")
SEEDS = (0, 1, 2)
POLICIES = ("random", "lru", "lfu", "hot set", "known step", "lookahead", "sees 1", "sees 4", "optimal")


def closed_gap(rows: Sequence[Row], held: int, policy: str = "lookahead") -> float:
    """Return how much of the gap between LRU's hit rate and the optimum's a policy closes; 1 where there is none."""
    rate = {row.policy: row.hit_rate for row in rows if row.held == held}
    gap = rate["optimal"] - rate["lru"]
    return (rate[policy] - rate["lru"]) / gap if gap > 0 else 1.0


def seven_domains(text: Path, work: Path) -> tuple[Path, ...]:
    """Six folders, of which fiction makes two: its first and its second half in the order of the files' names."""
    files = sorted((text / "fiction").glob("*.txt"))
    halves = []
    for name, part in (("fiction-1", files[: len(files) // 2]), ("fiction-2", files[len(files) // 2 :])):
        halves.append(work / name)
        halves[-1].mkdir()
        for file in part:
            (halves[-1] / file.name).symlink_to(file)
    return (*halves, *(text / name for name in FOLDERS if name != "fiction"))


def make_read_me(args: argparse.Namespace, work: Path) -> Path:
    options = ReadMeOptions(
        model=args.shared_folder / "models" / "stories3M", out=work / "read-me",
        domains=seven_domains((args.shared_folder / "text").resolve(), work), rounds=1, steps=0,
        router_steps=args.steps, router_batch=2, dim=128, router_learning_rate=6e-3, loss="mass",
        pool_tokens=args.pool_tokens,
    )  # fmt: skip
    read_me(options, RichProgress())
    return options.out


def make_paths(args: argparse.Namespace, work: Path) -> Path:
    texts = tuple(args.shared_folder / "text" / name for name in FOLDERS)
    cut = ConvertOptions(args.shared_folder / "models" / "stories3M", work / "cut", 8, None, 6, texts)
    convert(cut, RichProgress())
    options = DecoupleOptions(cut.out, work / "paths", texts, args.steps, pool_tokens=args.pool_tokens)
    decouple(options, RichProgress())
    return options.out


def record_all(model: Path, args: argparse.Namespace) -> list[Recording]:
    """One recording a seed."""
    texts = tuple(args.shared_folder / "text" / name for name in FOLDERS)
    trace = args.shared_folder / "traces" / "azure2023_conv.csv"
    found = []
    for seed in SEEDS:
        computer, unit_bytes, requests = requests_of(model, texts, trace, args.requests, args.length_scale, seed)
        found.append(record(computer, requests, Pace(), unit_bytes))
    return found


def replay(recordings: Sequence[Recording], capacities: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of all policies for the recording of each seed; capacities below 1 are shares."""
    found: list[dict[str, Any]] = []
    for seed, recording in zip(SEEDS, recordings, strict=True):
        num_units = int(recording.used_SLR.any(axis=0).sum())
        held = [round(num_units * c) if c < 1 else int(c) for c in capacities]
        rows = replay_all(recording, held, seed, bandwidth=None, layer_s=0.0, lead=0)
        used = recording.used_SLR.sum(axis=2)
        found.append(
            {
                "seed": seed,
                "steps": recording.num_steps,
                "units": num_units,
                "units_a_layer": round(float(used[used > 0].mean()), 2),
                "tokens_a_step": round(float(recording.tokens_S.mean()), 1),
                "rows": [asdict(row) for row in rows],
                "closed": {num: round(closed_gap(rows, num), 4) for num in held},
            }
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Hit rates of caching policies", ""]
    for name, case in result["models"].items():
        first = case[0]
        lines += [f"## {name}", ""]
        lines += [
            f"{first['steps']} steps of {first['tokens_a_step']} tokens on average (seed 0), which use "
            f"{first['units_a_layer']} of a layer's experts; {first['units']} in all. Gap closed: how much of the way "
            "from LRU to the optimum lookahead goes. What sees 1 or 4 knows so many steps more than anybody can.", "",
        ]  # fmt: skip
        lines += [
            "| held | seed | " + " | ".join(POLICIES) + " | gap closed |",
            "| --: | --: |" + " --: |" * (len(POLICIES) + 1),
        ]
        for seed in case:
            rate = {(row["held"], row["policy"]): row["hit_rate"] for row in seed["rows"]}
            for held, closed in seed["closed"].items():
                cells = " | ".join(f"{100 * rate[int(held), policy]:.1f}" for policy in POLICIES)
                lines.append(f"| {held} | {seed['seed']} | {cells} | {100 * closed:.0f} % |")
        lines.append("")
    return "\n".join(lines) + f"\n{result['setting']}\n\n{sentence(result['surroundings'])}.\n"


def write(models: dict[str, Any], args: argparse.Namespace) -> None:
    setting = (
        f"{args.requests} requests of the Azure conversation trace, lengths times {args.length_scale}, cut to the "
        f"context; texts of {', '.join(FOLDERS)} in turn. A step takes {Pace().step_s * 1e3:g} ms and "
        f"{Pace().token_s * 1e3:g} ms a token on the recording's clock, up to {Pace().step_tokens} tokens."
    )
    result = {"models": models, "setting": setting, "surroundings": surroundings("cache", ["transformers"])}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cache.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "cache.md").write_text(markdown(result))
    name = next(iter(models))
    draw([Row(**row) for row in models[name][0]["rows"]], args.out / "cache.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M, text and traces")
    parser.add_argument("--paths", type=Path, nargs="*", default=[], help="more checkpoints with exact paths")
    parser.add_argument("--read-me", type=Path, help="a checkpoint of seven domain experts made before")
    parser.add_argument("--stories", type=Path, help="a decoupled stories3M made before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pool-tokens", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--unit-steps", type=int, default=1000, help="steps of a recording that units are replayed for")
    parser.add_argument("--length-scale", type=float, default=0.25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recordings = record_all(args.read_me or make_read_me(args, work), args)
        num_layers = recordings[0].used_SLR.shape[1]
        whole = [recording.one_index() for recording in recordings]
        models["Seven domain experts of stories3M, whole experts held"] = replay(whole, [2, 3, 4, 5])
        write(models, args)
        name = f"The same, units held: an expert of one of {num_layers} layers each"
        models[name] = replay([r.first(args.unit_steps) for r in recordings], [num_layers * n for n in (2, 3, 4, 5)])
        write(models, args)
        for path in [*args.paths, args.stories or make_paths(args, work)]:
            name = f"{'stories3M' if path.name == 'paths' else path.name}, a path of its own in every layer, units held"
            models[name] = replay([r.first(args.unit_steps) for r in record_all(path, args)], [0.25, 0.5, 0.75])
            write(models, args)
    print((args.out / "cache.md").read_text())


if __name__ == "__main__":
    main()

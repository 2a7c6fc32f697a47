"""Quality of every kind of routing on one cut of stories3M, in one run.

    python -m benchmarks.stories --shared-folder ../shared

What `pregate evaluate --controls` prints, for a decoupled checkpoint of the default recipe: dense parent, static mask,
random routing, either gate, path router and oracle on the same held-out stories. Also: with every routed expert on,
how far the logits are from the dense model's. Writes results/stories.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuts import label
from benchmarks.surroundings import sentence, surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.controls import AllPolicy
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import RichProgress
from pregate.model.folder import read_folder
from pregate.model.quiet import quiet_transformers


@torch.no_grad()
def all_on_difference(source: Path, routed_path: Path, num_rows: int = 32) -> float:
    """Largest absolute logit difference to the dense model with every routed expert on, on random tokens."""
    dense, routed = load_any(read_folder(source)), load_any(read_folder(routed_path))
    routed.routing_policy = AllPolicy()
    vocabulary = dense.config.vocab_size
    ids = torch.randint(3, vocabulary, (num_rows, 1, 256), generator=torch.Generator().manual_seed(0))
    return max((routed(x, use_cache=False).logits - dense(x).logits).abs().max().item() for x in ids)


class Stopwatch:
    """Seconds of each named call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        result = function(*arguments)
        self.seconds[name] = round(time.monotonic() - started, 1)
        return result


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    source, stories = args.shared_folder / "models" / "stories3M", args.shared_folder / "text" / "stories"
    watch, progress, train = Stopwatch(), RichProgress(), (stories / "ts_train.jsonl",)
    options = ConvertOptions(
        source, work / "layerwise", args.experts, args.shared, args.active, train, seed=args.seed, restart=True
    )
    watch("convert", convert, options, progress)
    watch("decouple", decouple, DecoupleOptions(options.out, work / "path", train, seed=args.seed), progress)
    held_out = EvaluateOptions(work / "path", (stories / "ts_heldout.jsonl",), controls=True, parent=source)
    scored = watch("evaluate", evaluate, held_out, progress)
    return {
        "cut": label((args.experts, args.shared, args.active)),
        "num_documents": scored["num_documents"],
        "num_tokens": scored["num_tokens"],
        "rows": scored["controls"],
        "all_on_max_logit_difference": all_on_difference(source, options.out),
        "seconds": watch.seconds,
    }


def markdown(result: dict[str, Any]) -> str:
    columns = {"perplexity": 3, "ratio_to_dense": 3, "bits_per_byte": 4, "active_share": 3}
    columns |= {"same_set": 3, "mean_overlap": 3}
    lines = [
        f"# stories3M {result['cut']}: routing compared",
        "",
        "| routing | perplexity | ratio to dense | bits per byte | FFN active | oracle's set | picks shared with it |",
        "| --- |" + " --: |" * len(columns),
    ]
    for name, row in result["rows"].items():
        cells = (f"{row[column]:.{digits}f}" if column in row else "" for column, digits in columns.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = ", ".join(f"{k} {v}" for k, v in result["seconds"].items())
    notes = f"""
{result["num_documents"]} held-out stories, {result["num_tokens"]} scored tokens; per document, BOS prepended, truncated
to the context. No weight was tuned. With every routed expert on, the logits differ from the dense model's by at most
{result["all_on_max_logit_difference"]:.1e}.

{sentence(result["surroundings"])}. Seconds: {seconds}.
"""
    return "\n".join(lines) + "\n" + notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M and text/stories")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--shared", type=int, default=3)
    parser.add_argument("--active", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as work:
        result = run(args, Path(work))
    result["surroundings"] = surroundings("stories", ["transformers"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stories.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "stories.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

"""A model twice as large as the memory it is given: pregate with a cut of it, peers with all of it.

    python -m benchmarks.larger_than_memory --parent FOLDER --work FOLDER
        [--shared-folder ../shared] [--llama-python VENV/bin/python --gguf FILE.gguf]

The parent is a dense model in bfloat16; where there is none, a random Llama of 2.9B parameters is written there, and
its cut (random too, `random_cut.py`) in `--work`. The limit is a share of the parent's bytes. What a model has besides
its FFNs must leave room in it for Python and torch (0.4 GB): of a smaller one not even that fits.

Each contender is a process of its own (`contenders.py`), in a memory cgroup of its own from its first instruction on,
and nothing of the files is cached when it starts: pregate, engine and host in one process, with lookahead and with LRU;
transformers and llama.cpp (`llama_gguf.py` writes its file) with the parent mapped. All get the same prompts and make
the same number of tokens, ends of text ignored; a first request of two tokens is not measured. pregate computes in one
thread, beside the one that fetches, peers in two. Code that other processes use, too, may be charged to those. Needs
root. Writes results/larger_than_memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.any_size import Shape, make_model
from benchmarks.engine import Contender
from benchmarks.memory_cgroup import MemoryCgroup
from benchmarks.random_cut import random_cut
from benchmarks.surroundings import ROOT, sentence, surroundings
from pregate.model.checkpoint import CheckpointReader
from pregate.model.read_check import Hashes

SHAPE = Shape(hidden=2048, width=11008, layers=36, heads=16, kv_heads=2, vocabulary=32000)
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
Row = dict[str, Any]


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def contenders(args: argparse.Namespace, cut: Path) -> list[tuple[str, ...]]:
    """Name, Python, kind and parameters of each."""
    here, parent = sys.executable, str(args.parent)
    found = [
        (f"pregate, {policy}", here, "pregate_tiers", str(cut), str(args.resident), policy)
        for policy in ("lookahead", "lru")
    ]
    found.append(("transformers, mapped", here, "transformers", parent, "auto", "2"))
    if args.gguf:
        found.append(("llama.cpp, mapped", args.llama_python or here, "llama_cpp", str(args.gguf), "4", "2"))
    return found


def drop_caches() -> None:
    """Have nothing of any file in memory that no process uses."""
    os.sync()
    DROP_CACHES.write_text("3")


def measure(contender: tuple[str, ...], prompts: Sequence[str], limit_bytes: int, args: argparse.Namespace) -> Row:
    """Run a contender in a group of its own: its start, then so many requests at once as `args.counts` say."""
    row: Row = {"contender": contender[0], "runs": []}
    drop_caches()
    with MemoryCgroup(limit_bytes) as group:
        try:
            running = Contender(*contender, enter=group.enter)
            running.run(list(prompts[:1]), 2)
            row |= {"start_s": running.start_s, "start_read_bytes": group.read_bytes()}
            for count in args.counts:
                before = group.read_bytes()
                speed = running.run(list(prompts[:count]), args.new_tokens)
                read = group.read_bytes() - before
                row["runs"].append({"requests": count, "tokens_per_s": speed, "read_bytes": read})
                print(contender[0], row["runs"][-1], flush=True)
            row |= group.memory()
            running.close()
        except RuntimeError as error:
            row |= group.memory() | {"failed": "killed for lack of memory" if group.killed else str(error)}
    return row


def markdown(result: Row) -> str:
    lines = ["# A model larger than the memory it is given", "", result["setting"], ""]
    lines += ["| contender | requests | tokens/s | read, MB a token | read at start, MB | peak, MB | in no file, MB |"]
    lines += ["| --- |" + " --: |" * 6]
    for row in result["rows"]:
        memory = f"{(row['peak_bytes'] or 0) / 1e6:.0f} | {row['own_bytes'] / 1e6:.0f}"
        if "failed" in row:
            lines.append(f"| {row['contender']} | {row['failed'].splitlines()[-1]} | | | | {memory} |")
        for run in row["runs"]:
            num_tokens = run["requests"] * result["new_tokens"]
            lines.append(
                f"| {row['contender']} | {run['requests']} | {run['tokens_per_s']:.2f} "
                f"| {run['read_bytes'] / num_tokens / 1e6:.0f} "
                f"| {row.get('start_read_bytes', 0) / 1e6:.0f} | {memory} |"
            )
    return "\n".join(lines) + f"\n\n{sentence(result['surroundings'])}.\n"


def setting(args: argparse.Namespace, parent_bytes: int, limit_bytes: int, cut: Path) -> str:
    return (
        f"{args.parent.name}, {parent_bytes / 1e9:.2f} GB, and S{args.shared}A{args.active}E{args.experts} of it, "
        f"{weight_bytes(cut) / 1e9:.2f} GB, of whose routed experts {100 * args.resident:g} % have a slot; "
        f"limit {limit_bytes / 1e9:.2f} GB, page cache included. {args.new_tokens} new tokens a request, prompts "
        f"included in the time. {args.beside}".strip()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, required=True)
    parser.add_argument("--shared-folder", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, required=True, help="where the cut is kept")
    parser.add_argument("--limit", type=float, default=0.5, help="of the parent's bytes")
    parser.add_argument("--resident", type=float, default=0.12, help="of the routed experts, that have a slot")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--shared", type=int, default=1)
    parser.add_argument("--active", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4], help="requests at once")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--llama-python")
    parser.add_argument("--gguf", type=Path, help="the parent for llama.cpp")
    parser.add_argument("--beside", default="", help="what else ran on the machine, for the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if not args.parent.exists():
        make_model(args.parent, SHAPE, args.shared_folder / "models" / "stories3M")
    sizes = {"experts": args.experts, "shared": args.shared, "active": args.active}
    name = f"{args.parent.name}-S{args.shared}A{args.active}E{args.experts}"
    cut = random_cut(args.parent, args.work / name, **sizes, dtype=torch.bfloat16)
    CheckpointReader(cut, hashes=Hashes.FIRST)  # now, so that it is no part of the first contender's start
    text = args.shared_folder / "text" / "math" / "gsm8k-test.jsonl"
    questions = [json.loads(line)["question"] for line in text.read_text().splitlines()[: max(args.counts)]]
    prompts = [f"Question: {question}\nAnswer:" for question in questions]
    parent_bytes = weight_bytes(args.parent)
    limit_bytes = int(args.limit * parent_bytes)
    result: Row = {"setting": setting(args, parent_bytes, limit_bytes, cut), "new_tokens": args.new_tokens, "rows": []}
    for contender in contenders(args, cut):
        result["rows"].append(measure(contender, prompts, limit_bytes, args))
        result["surroundings"] = surroundings("larger_than_memory", ["transformers"])
        (args.out / "larger_than_memory.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "larger_than_memory.md").write_text(markdown(result))
    print((args.out / "larger_than_memory.md").read_text())


if __name__ == "__main__":
    main()

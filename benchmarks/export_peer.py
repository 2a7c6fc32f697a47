"""An export as Qwen2-MoE in vLLM, beside transformers on the same folder: greedy ids, perplexity, tokens per second.

    python -m benchmarks.export_peer --export FOLDER --vllm-python VENV/bin/python --shared-folder ../shared

FOLDER is what `pregate export --format qwen2_moe` wrote; the virtual environment has vLLM's CPU build. Each reads it in
a process of its own (`export_readers.py`) that knows nothing of pregate, one after the other. Prompts are GSM8K's test
questions, the text scored is its questions with their answers. Writes results/export_peer.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from benchmarks.surroundings import ROOT, sentence, shown, surroundings

NUM_PROMPTS, NEW_TOKENS, TOGETHER = 32, 64, (1, 4, 16)
RESULTS = Path(__file__).parent / "results"
#: vLLM's CPU build on one thread; it starts in minutes.
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
PATIENCE_S = 3600.0


def questions(args: argparse.Namespace) -> dict[str, Any]:
    """What both are asked, as token ids."""
    tokenizer: Any = AutoTokenizer.from_pretrained(args.export)
    lines = (args.shared_folder / "text" / "math" / "gsm8k-test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [ids(f"Question: {r['question']}\nAnswer:") for r in records[:NUM_PROMPTS]]
    rows: list[list[int]] = []
    for record in records:
        if sum(len(row) - 1 for row in rows) >= args.max_tokens:
            break
        rows.append(start + ids(f"{record['question']}\n{record['answer']}"))
    return {
        "prompts": prompts,
        "rows": rows,
        "new_tokens": NEW_TOKENS,
        "together": TOGETHER,
        "rounds": args.rounds,
    }


def ask(kind: str, python: str, folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The answers of one reader."""
    environment = os.environ | SETTINGS | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "questions.json").write_text(json.dumps(asked))
        command = [python, "-m", "benchmarks.export_readers", kind, folder.resolve()]
        command += [work / "questions.json", work / "answers.json"]
        subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=PATIENCE_S)
        return json.loads((work / "answers.json").read_text())


def compare_ids(ours: dict[str, Any], theirs: dict[str, Any], ends: set[int]) -> dict[str, Any]:
    """How many texts are equal, in all and up to the first end of text; where others part, and by what margin."""
    whole, to_end, parted = 0, 0, []
    for number, (first, second) in enumerate(zip(ours["ids"], theirs["ids"], strict=True)):
        end = next((n for n, i in enumerate(first) if i in ends), len(first) - 1)
        at = next((n for n, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), None)
        whole += at is None
        to_end += at is None or at > end
        if at is not None:
            margin = ours["margins"][number][at]
            parted.append({"prompt": number, "token": at, "margin": margin, "after_end_of_text": at > end})
    return {"equal": whole, "equal_to_end_of_text": to_end, "num": len(ours["ids"]), "parted": parted}


def perplexity(found: dict[str, Any], num_tokens: int) -> float:
    return math.exp(sum(found["nats"]) / num_tokens)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    asked = questions(args)
    readers = {"transformers": ask("transformers", sys.executable, args.export, asked)}
    readers["vllm"] = ask("vllm", args.vllm_python, args.export, asked)
    num_tokens = sum(len(row) - 1 for row in asked["rows"])
    eos = GenerationConfig.from_pretrained(args.export).eos_token_id
    record = json.loads((args.export / "export.json").read_text())
    return surroundings("export_peer", ["transformers"]) | {
        "export": shown(args.export),
        "stored_as": record["figures"]["stored_as"],
        "readers": {
            name: {k: found[k] for k in ("architecture", "version", "tokens_per_s", "seconds")}
            | {"perplexity": perplexity(found, num_tokens)}
            for name, found in readers.items()
        },
        "largest_difference_nats_per_row": max(
            abs(a - b) for a, b in zip(readers["transformers"]["nats"], readers["vllm"]["nats"], strict=True)
        ),
        "num_tokens": num_tokens,
        "num_rows": len(asked["rows"]),
        "new_tokens": NEW_TOKENS,
        "rounds": args.rounds,
        "ids": compare_ids(readers["transformers"], readers["vllm"], {eos} if isinstance(eos, int) else set(eos or ())),
    }


def markdown(result: dict[str, Any]) -> str:
    ids = result["ids"]
    lines = [
        f"# The Qwen2-MoE export {result['export']} in vLLM and in transformers",
        "",
        f"{sentence(result)}.",
        "",
        f"The folder is stored as {result['stored_as']}; both read it in float32, one thread, one after the other.",
        "",
        "| reader | class | perplexity | " + " | ".join(f"tokens/s at {n}" for n in TOGETHER) + " |",
        "| --- | --- | --: |" + " --: |" * len(TOGETHER),
    ]
    for name, found in result["readers"].items():
        speeds = " | ".join(f"{found['tokens_per_s'][str(n)]:.1f}" for n in TOGETHER)
        lines.append(f"| {name} {found['version']} | {found['architecture']} | {found['perplexity']:.5f} | {speeds} |")
    lines += [
        "",
        f"Perplexity: {result['num_tokens']:,} tokens of {result['num_rows']} GSM8K test questions with answers; the"
        f" sums of two readers differ by {result['largest_difference_nats_per_row']:.2g} nats at most in a row. Speed:"
        f" {result['new_tokens']} new tokens each, prefill included, best of {result['rounds']}.",
        "",
        f"Greedy ids of {ids['num']} questions, {result['new_tokens']} tokens each, end of text ignored: all equal for"
        f" {ids['equal']}, up to the first end of text for {ids['equal_to_end_of_text']}.",
    ]
    for part in ids["parted"]:
        after = ", after the end of text" if part["after_end_of_text"] else ""
        lines.append(
            f"- prompt {part['prompt']} parts at token {part['token']}{after}: margin {part['margin']:.2g} nats"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True, help="a folder of pregate export --format qwen2_moe")
    parser.add_argument("--vllm-python", required=True, help="the interpreter of an environment with vLLM")
    parser.add_argument("--shared-folder", type=Path, required=True, help="with text/math")
    parser.add_argument("--max-tokens", type=int, default=4000, help="scored, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "export_peer.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "export_peer.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

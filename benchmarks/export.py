"""An exported folder in plain transformers, pregate not on the path: greedy texts, logits, perplexity.

    python -m benchmarks.export --shared-folder ../shared [--older-transformers FOLDER]

stories3M is cut by recipe stock to S3A3E8 and exported as qwen2_moe and as dense. Another process, in which importing
pregate fails, loads the first, writes greedy texts after 8 prompts, and scores the held-out stories; here the routed
model does the same. Beside it: what other factors of the gates and other types would have given. With
`--older-transformers` (a folder made by `pip install --no-deps --target FOLDER transformers==4.57.3 'tokenizers<0.23'
'huggingface_hub<1'`) the same reader runs on that as well. Writes results/export.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.surroundings import sentence, shown, surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.export.check import compare_logits, greedy, load_stock
from pregate.convert.export.gate_scale import measure_scales
from pregate.convert.export.qwen2_moe import write_qwen2_moe
from pregate.convert.export.run import ExportOptions, export
from pregate.convert.export.stock_class import stock_config, write_stock_config
from pregate.convert.files.routed_shards import RoutedShards
from pregate.convert.measure.scoring import encode_all, score_rows
from pregate.convert.progress import QUIET, RichProgress
from pregate.convert.text.documents import read_documents
from pregate.model.folder import read_folder
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.quiet import quiet_transformers

PROMPTS = (
    "Once upon a time there was a little",
    "The dog ran to the",
    "Tom wanted to buy a red",
    "It was raining, and Mum said",
    "Lily found a shiny stone in",
    "The old man had a big",
    "One day a bird came to",
    "Ben was sad because his",
)
NEW_TOKENS, NUM_KEPT, SWEEP_TOKENS, SCALE_TOKENS = 64, 32, 12000, 4096
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Reader:
    """The process without pregate: what it is asked, and where it leaves its answers."""

    work: Path
    rows: list[list[int]]

    def ask(self, folder: Path, transformers_folder: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its figures, and logits of the first rows."""
        asked = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "rows": self.rows, "num_kept": NUM_KEPT}
        (self.work / "questions.json").write_text(json.dumps(asked))
        around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if transformers_folder is not None:
            around["PYTHONPATH"] = str(transformers_folder.resolve())
        script, answers = Path(__file__).with_name("export_plain.py"), self.work / "answers.safetensors"
        command = [sys.executable, script, folder, self.work / "questions.json", answers]
        subprocess.run(command, check=True, cwd=self.work, env=around)
        return json.loads(answers.with_suffix(".json").read_text()), load_file(answers)


@torch.no_grad()
def compare(reader: Reader, folder: Path, routed: Any, tokenizer: Any, older: Path | None) -> dict[str, Any]:
    """The reader's answers beside the routed model's own."""
    found, logits = reader.ask(folder, older)
    prompts = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in PROMPTS]
    ours = [greedy(routed, prompt, NEW_TOKENS) for prompt in prompts]
    differences, largest = [], 0.0
    for number, row in enumerate(reader.rows[:NUM_KEPT]):
        mine_NV = routed(torch.tensor([row]), use_cache=False).logits[0]
        differences.append((mine_NV - logits[str(number)]).abs().amax(dim=-1))
        largest = max(largest, mine_NV.abs().max().item())
    difference_P = torch.cat(differences)
    texts = found.pop("texts")
    return found | {
        "texts_equal": sum(a == b for a, b in zip(ours, texts, strict=True)),
        "num_texts": len(texts),
        "tokens_equal_before_parting": [_common(a, b) for a, b in zip(ours, texts, strict=True)],
        "text_tokens": [len(text) for text in ours],
        "logits": {
            "num_positions": len(difference_P),
            "median_difference": difference_P.median().item(),
            "p999_difference": difference_P.quantile(0.999).item(),
            "largest_difference": difference_P.max().item(),
            "largest_logit": largest,
        },
    }


def _common(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
    )


def sweep(source: RoutedShards, routed: RoutedForCausalLM, rows: list[list[int]], work: Path) -> list[dict[str, Any]]:
    """The export at other sizes of the gates' largest weight (None: measured for each layer), and in other types."""
    table = []
    cases = [("float32", scale) for scale in (None, 1e-2, 1e-3, 1e-4, 1e-5)]
    for dtype, scale in [*cases, ("float16", None), ("bfloat16", None)]:
        scales = measure_scales(routed, rows, SCALE_TOKENS, getattr(torch, dtype), scale)
        with tempfile.TemporaryDirectory(dir=work) as name:
            write_stock_config(stock_config(source.config, dtype), Path(name))
            factors = [s.factor for s in scales]
            write_qwen2_moe(source, factors, Path(name), getattr(torch, dtype), QUIET)
            figures = compare_logits(routed, load_stock(Path(name)), rows, QUIET)
        others = max(s.expected_other_experts for s in scales)
        table.append({"dtype": dtype, "scale": scale, "factors": factors, "other_experts": others} | figures)
    return table


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    stories, model = args.shared_folder / "text" / "stories", args.shared_folder / "models" / "stories3M"
    cut = {"model": model, "out": work / "routed", "experts": 8, "shared": 3, "active": 3}
    convert(ConvertOptions(recipe="stock", calibration=(stories / "ts_train.jsonl",), **cut), RichProgress())
    held_out = stories / "ts_heldout.jsonl"
    exported = export(ExportOptions(work / "routed", work / "stock", "qwen2_moe", (held_out,)), RichProgress())
    dense = export(ExportOptions(work / "routed", work / "dense", "dense"), RichProgress())
    tokenizer, context = read_folder(model).tokenizer, read_folder(model).context_tokens
    texts = [document.text for document in read_documents([held_out], context, "--text")]
    rows = encode_all(tokenizer, texts, context, None)[0]
    routed = RoutedForCausalLM.from_pretrained(work / "routed", dtype=torch.float32).eval()
    reader = Reader(work, rows)
    readers = [compare(reader, work / "stock", routed, tokenizer, None)]
    if args.older_transformers:
        readers.append(compare(reader, work / "stock", routed, tokenizer, args.older_transformers))
    few = encode_all(tokenizer, texts, context, SWEEP_TOKENS)[0]
    return surroundings("export", ["transformers", "safetensors"]) | {
        "routed_perplexity": score_rows(routed, rows).perplexity,
        "readers": readers,
        "export": exported,
        "dense": dense | {"parent": shown(dense["parent"])},
        "sweep": sweep(RoutedShards(read_folder(work / "routed")), routed, few, work),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = ["# stories3M, recipe stock, S3A3E8, exported as Qwen2-MoE", "", f"{sentence(result)}.", ""]
    lines += ["Read by plain transformers in a process in which importing pregate fails:", ""]
    lines += ["| | class | greedy texts equal | perplexity | routed | ratio | logits: median, 99.9 %, largest |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for found in result["readers"]:
        logits, ratio = found["logits"], found["perplexity"] / result["routed_perplexity"]
        parts = (logits["median_difference"], logits["p999_difference"], logits["largest_difference"])
        row = [
            f"transformers {found['transformers']}",
            found["class"],
            f"{found['texts_equal']} of {found['num_texts']}",
        ]
        row += [f"{found['perplexity']:.5f}", f"{result['routed_perplexity']:.5f}", f"{ratio:.6f}"]
        lines.append("| " + " | ".join([*row, ", ".join(f"{part:.2g}" for part in parts)]) + " |")
    kept = result["readers"][0]["logits"]
    lines += [
        "",
        f"Logits: absolute differences over {kept['num_positions']} positions of the first {NUM_KEPT} held-out",
    ]
    lines += [f"stories; the largest logit is {kept['largest_logit']:.1f}. Perplexity: all of ts_heldout.jsonl,"]
    lines += [
        f"{result['readers'][0]['num_tokens']} tokens. Texts: {NEW_TOKENS} new tokens at most, after 8 prompts:",
        "",
    ]
    lines += [f"- {p} **{text.strip()}**" for p, text in zip(PROMPTS, result["readers"][0]["decoded"], strict=True)]
    lines += ["", f"Dense export: {result['dense']['tensors_equal']} tensors equal to the parent's, bit for bit.", ""]
    lines += [
        f"What shrinks the gates (first {SWEEP_TOKENS} held-out tokens; differences relative to the largest logit):",
        "",
    ]
    lines += [
        "| type | largest gate weight | other experts (worst layer) | median | largest | same top token | ratio |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in result["sweep"]:
        numbers = [row["other_experts"], row["median_relative_difference"], row["largest_relative_difference"]]
        cells = [row["dtype"], row["scale"] or "measured per layer", *(f"{n:.2g}" for n in numbers)]
        lines.append("| " + " | ".join(map(str, [*cells, row["same_top_token"], row["perplexity_ratio"]])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True)
    parser.add_argument("--older-transformers", type=Path)
    args = parser.parse_args()
    quiet_transformers()
    with tempfile.TemporaryDirectory() as name:
        result = measure(args, Path(name))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "export.md").write_text(markdown(result))


if __name__ == "__main__":
    main()

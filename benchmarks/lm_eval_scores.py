"""lm-eval's scores of a cut behind Ray Serve's HTTP, beside its dense parent's by lm-eval's own transformers model.

    python -m benchmarks.lm_eval_scores --adapter examples/smollm2 --parent SMOLLM2 --lm-eval-python VENV/bin/python \\
        --shared-folder ../shared

The virtual environment has `lm-eval[api,hf]`. Its `local-completions` model knows nothing of pregate: it asks for the
logprobs of prompts (`echo`), several at a time. The tasks are of text at hand: WikiText-2's paragraphs, which of four
second halves is a paragraph's own, and which of four first steps is a GSM8K question's. Writes results/lm_eval.json
and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.http_app import http_app
from benchmarks.surroundings import sentence, surroundings
from tests.cluster.leftovers import serving

RESULTS = Path(__file__).parent / "results"
PATIENCE_S, NUM_CHOICES, CONTEXT = 3600.0, 4, 1024
#: What lm-eval calls the scores, and what the table does.
SHOWN = {
    "wiki_text": {"bits_per_byte,none": "bits per byte", "word_perplexity,none": "perplexity per word"},
    "wiki_half": {"acc,none": "accuracy", "acc_norm,none": "accuracy by length"},
    "gsm8k_step": {"acc,none": "accuracy", "acc_norm,none": "accuracy by length"},
}
_CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{start}}", "doc_to_choice": "choices"}
_CHOICE |= {"doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
_ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
_ROLLING |= {"metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]}


def paragraphs(shared: Path) -> list[str]:
    """WikiText-2's test paragraphs of 60 to 200 words."""
    lines = (shared / "text" / "wiki" / "wikitext-2-test.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if 60 <= len(line.split()) <= 200 and not line.strip().startswith("=")]


def steps(shared: Path) -> list[tuple[str, str]]:
    """GSM8K's test questions, each with the first line of its solution."""
    lines = (shared / "text" / "math" / "gsm8k-test.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["question"], re.sub(r"<<.*?>>", "", r["answer"].splitlines()[0])) for r in records]


def among_others(pairs: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Each beginning with its own ending among those of the next ones, in a place that goes round."""
    for number, (start, _) in enumerate(pairs):
        choices = [pairs[(number + other) % len(pairs)][1] for other in range(NUM_CHOICES)]
        place = number % NUM_CHOICES
        choices = choices[1 : place + 1] + choices[:1] + choices[place + 1 :]
        yield {"start": start, "choices": choices, "label": place}


def write_tasks(folder: Path, shared: Path, limit: int) -> None:
    """lm-eval's description of each task, and its documents."""
    texts = paragraphs(shared)[:limit]
    halves = [(" ".join(w[: len(w) // 2]), " ".join(w[len(w) // 2 :])) for w in map(str.split, texts)]
    questions = [(f"Question: {question}\nAnswer:", step) for question, step in steps(shared)[:limit]]
    tasks = {
        "wiki_text": (_ROLLING, [{"text": text} for text in texts]),
        "wiki_half": (_CHOICE, list(among_others(halves))),
        "gsm8k_step": (_CHOICE, list(among_others(questions))),
    }
    for name, (task, documents) in tasks.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(document) + "\n" for document in documents))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **task}))


def scores(python: str, tasks: Path, kind: str, **model_args: object) -> dict[str, Any]:
    """What lm-eval says of a model, by task and metric."""
    out = tasks / f"out-{kind}"
    command = [python, "-m", "lm_eval", "--model", kind, "--tasks", ",".join(SHOWN), "--include_path", str(tasks)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    command += ["--batch_size", "4", "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=kept | offline, timeout=PATIENCE_S)
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def measure(args: argparse.Namespace, tasks: Path) -> dict[str, Any]:
    known = {"adapter": str(args.adapter.resolve()), "parent": str(args.parent.resolve())}
    flags = [word for name, value in known.items() for word in (f"--{name}", value)]
    with serving(*flags) as running, http_app(running, known) as url:
        served = scores(
            args.lm_eval_python, tasks, "local-completions",
            base_url=f"{url}/v1/completions", model=args.adapter.name, tokenizer=known["parent"],
            tokenized_requests=True, num_concurrent=4, max_length=CONTEXT, max_retries=1,
        )  # fmt: skip
    whole = {"pretrained": known["parent"], "dtype": "float32", "max_length": CONTEXT}
    return {"dense": scores(args.lm_eval_python, tasks, "hf", **whole), "served": served}


def markdown(found: dict[str, Any]) -> str:
    lines = ["# lm-eval's scores", "", f"{found['what']} {sentence(found['around'])}.", ""]
    lines += ["| task | score | dense | cut, served |", "| --- | --- | --: | --: |"]
    for task, metrics in SHOWN.items():
        for metric, name in metrics.items():
            shown = []
            for who in ("dense", "served"):
                value, error = (found[who][task].get(key) for key in (metric, metric.replace(",", "_stderr,")))
                shown.append(f"{value:.3f} ± {error:.3f}" if isinstance(error, float) else f"{value:.3f}")
            lines.append(f"| {task} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--parent", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--lm-eval-python", required=True, help="the interpreter of an environment with lm-eval")
    parser.add_argument("--shared-folder", type=Path, required=True, help="with text/wiki and text/math")
    parser.add_argument("--limit", type=int, default=100, help="documents of each task")
    args = parser.parse_args()
    around = surroundings("lm_eval_scores", ("ray", "fastapi"))
    with tempfile.TemporaryDirectory() as name:
        write_tasks(Path(name), args.shared_folder.resolve(), args.limit)
        found = measure(args, Path(name))
    what = (
        f"{args.limit} documents a task, fp32. The cut {args.adapter.name} by `local-completions` through Ray Serve's"
    )
    what += " HTTP, prompts as ids; its dense parent by lm-eval's `hf`."
    result = {"what": what, "around": around, **found}
    (RESULTS / "lm_eval.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "lm_eval.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

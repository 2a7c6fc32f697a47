"""Read-ME's domain experts beside the clusters of `convert` and `decouple`, at the same active share and text.

    python -m benchmarks.read_me --shared-folder ../shared

Per model and active share, without tuning: Read-ME as published (overlap target, paper's loss), with another loss, and
with contributions in place of activations; then `convert` (8 experts, --shared auto) and `decouple`. All routers learn
for as many steps on the same documents; all are scored on the same held-back documents of the domains. Controls are on
the published cut. Writes results/read_me.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.surroundings import sentence, surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.domains.domains import Domain, read_domains
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.run import read_me
from pregate.convert.files.dense import load_dense
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.control_table import control_rows
from pregate.convert.measure.scoring import Score, score_rows
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import RichProgress
from pregate.model.folder import read_folder
from pregate.model.layers import PathPolicy
from pregate.model.quiet import quiet_transformers

#: Names of the Read-ME variants and the options that make them.
VARIANTS: dict[str, dict[str, Any]] = {
    "read-me": {},
    "read-me, mass loss": {"loss": "mass"},
    "read-me, contributions": {"score": "contribution", "target": "contribution", "loss": "mass"},
}
CLUSTERS = "convert + decouple"
#: Documents of each domain that the controls are scored on.
CONTROL_DOCUMENTS = 4


@dataclass(frozen=True)
class Case:
    """One model and its domains, read as `read_me` reads them; `texts` has the training documents alone, as .jsonl."""

    name: str
    model: Path
    domains: tuple[Path, ...]
    read: list[Domain]
    texts: tuple[Path, ...]


def prepare(name: str, model: Path, domains: tuple[Path, ...], args: argparse.Namespace, work: Path) -> Case:
    tokenizer = read_folder(model).tokenizer
    length = min(4096, read_folder(model).context_tokens)
    read = read_domains(domains, tokenizer, 16, length, args.pool_tokens, args.seed)
    texts = []
    for domain in read:
        path = work / name / domain.name / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(json.dumps({"text": tokenizer.decode(row[1:])}) for row in domain.rows))
        texts.append(path)
    return Case(name, model, domains, read, tuple(texts))


def perplexities(model: Any, domains: Sequence[Domain]) -> dict[str, float]:
    scores = {domain.name: score_rows(model, domain.held_back) for domain in domains}
    total = sum(scores.values(), Score(0.0, 0))
    return {name: round(score.perplexity, 3) for name, score in (scores | {"all": total}).items()}


def by_label(model: Any, domains: Sequence[Domain]) -> dict[str, float]:
    """Perplexity when every token of a domain visits that domain's expert."""
    total = Score(0.0, 0)
    scores: dict[str, Score] = {}
    for expert, domain in enumerate(domains):
        for row in domain.held_back:
            ids_TLK = torch.full((len(row), len(model.config.cuts), 1), expert)
            score = score_rows(model, [row], control=PathPolicy(ids_TLK))
            scores[domain.name] = scores.get(domain.name, Score(0.0, 0)) + score
        total += scores[domain.name]
    return {name: round(score.perplexity, 3) for name, score in (scores | {"all": total}).items()}


def domain_experts(case: Case, share: float, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every variant of Read-ME, and the controls on the first."""
    found: dict[str, Any] = {}
    for name, changes in VARIANTS.items():
        fields: dict[str, Any] = {"rounds": 1, "steps": 0, "router_steps": args.steps, "router_batch": 2, "dim": 128}
        fields |= {"router_learning_rate": 6e-3, "pool_tokens": args.pool_tokens, "seed": args.seed}
        out = work / case.name / f"{share}-{name}"
        options = ReadMeOptions(
            model=case.model, out=out, domains=case.domains, active_share=share, **(fields | changes)
        )
        started = time.monotonic()
        figures = read_me(options, RichProgress()).figures
        routed = {row["name"]: round(row["routed_perplexity"], 3) for row in figures["by_domain"]}
        found[name] = {"seconds": round(time.monotonic() - started, 1)} | {
            "routed_perplexity": routed | {"all": round(figures["routed_perplexity"], 3)},
            "expert_share_by_domain": {row["name"]: row["expert_share"] for row in figures["by_domain"]},
        }
        found[name] |= {key: figures[key] for key in ("repeats_last_expert", "coverage", "swap")}
        if name == "read-me":
            model = load_any(read_folder(out))
            found["expert of the text's domain"] = {"routed_perplexity": by_label(model, case.read)}
            rows = [row for domain in case.read for row in domain.held_back[:CONTROL_DOCUMENTS]]
            found["controls"] = control_rows(model, rows, 1, load_dense(read_folder(case.model)), args.seed)
    return found


def clusters(case: Case, share: float, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = work / case.name
    options = ConvertOptions(
        case.model, folder / f"{share}-layerwise", 8, None, round(8 * share), case.texts, seed=args.seed
    )
    started = time.monotonic()
    convert(options, RichProgress())
    to_path = DecoupleOptions(
        options.out, folder / f"{share}-path", case.texts, args.steps, pool_tokens=args.pool_tokens, seed=args.seed
    )
    decouple(to_path, RichProgress())
    seconds = round(time.monotonic() - started, 1)
    return {"routed_perplexity": perplexities(load_any(read_folder(to_path.out)), case.read), "seconds": seconds}


def run(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """What is found, after each model and share: a run takes long, and what is done counts."""
    text, quartet = args.shared_folder / "text", Path(__file__).parents[1] / "examples" / "quartet"
    four = tuple(text / name for name in ("fiction", "nonfiction", "verse", "math"))
    cases = [prepare("quartet", quartet, four, args, work)]
    stories = args.shared_folder / "models" / "stories3M"
    cases.append(prepare("stories3M", stories, (text / "stories", *four, text / "wiki"), args, work))
    found: dict[str, Any] = {}
    for case in cases:
        found[case.name] = {"dense": perplexities(load_dense(read_folder(case.model)), case.read)}
        for share in (0.5, 0.75):
            methods = domain_experts(case, share, args, work) | {CLUSTERS: clusters(case, share, args, work)}
            found[case.name][str(share)] = methods
            yield found


def markdown(result: dict[str, Any]) -> str:
    lines = ["# Domain experts and clusters, not tuned: held-out perplexity", ""]
    for name, case in result["models"].items():
        dense = case["dense"]
        for share in (name for name in case if name != "dense"):
            lines += [f"## {name}, {share} of the FFN active", ""]
            lines += ["| | " + " | ".join(dense) + " | ratio |", "| --- |" + " --: |" * (len(dense) + 1)]
            rows = {"dense": dense} | {
                method: row["routed_perplexity"] for method, row in case[share].items() if "routed_perplexity" in row
            }
            for method, row in rows.items():
                cells = " | ".join(f"{row[domain]:.2f}" for domain in dense)
                lines.append(f"| {method} | {cells} | {row['all'] / dense['all']:.3f} |")
            controls = case[share]["controls"]
            of = ", ".join(f"{n} {row['perplexity']:.2f}" for n, row in controls.items())
            swap = case[share]["read-me"]["swap"]
            moved = f"{100 * (1 - swap['saved_share']):.0f} %"
            lines += ["", f"On the first cut, over {CONTROL_DOCUMENTS} documents a domain: {of}."]
            lines += [f"A swap that moves only rows that differ moves {moved} of an expert's bytes on average.", ""]
    return "\n".join(lines) + f"\n{sentence(result['surroundings'])}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M and text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pool-tokens", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as work:
        for found in run(args, Path(work)):
            result = {"models": found, "surroundings": surroundings("read_me", ["transformers"])}
            (args.out / "read_me.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.out / "read_me.md").write_text(markdown(result))
    print((args.out / "read_me.md").read_text())


if __name__ == "__main__":
    main()

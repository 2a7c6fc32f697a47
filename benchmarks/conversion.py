"""Quality of every way to convert: stories3M and quartet, 75, 50 and 25 % active, 8 and 16 experts, three seeds.

    python -m benchmarks.conversion --shared-folder ../shared [--models stories3M] [--work runs/conversion]

Each cell (model, cut, seed) converts by the recipes plain, cmoe-paper and capture (rows call it "ours"), and scores the
same held-out documents by the protocol of `convert/measure/scoring.py`. Static mask and random routing are those of
capture's cut. Every recipe is held to the oracle of its own cut. Variants of capture change one thing at a time. A
finished row is kept in --work, so an interrupted run goes on; with all rows there the results are written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion_report import write_report
from benchmarks.cuts import Cut, label
from benchmarks.surroundings import surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import RECIPES, ConvertOptions
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.agreement import AgreementMeter
from pregate.convert.measure.controls import OraclePolicy, RandomPolicy, static_mask
from pregate.convert.measure.scoring import encode_all, score_rows
from pregate.convert.text.documents import read_documents
from pregate.model.folder import read_folder
from pregate.model.layers import RoutingPolicy
from pregate.model.quiet import quiet_transformers

QUARTET = Path(__file__).resolve().parents[1] / "examples" / "quartet"
CUTS: tuple[Cut, ...] = ((8, 3, 3), (8, 2, 2), (8, 1, 1), (16, 6, 6), (16, 4, 4), (16, 2, 2))
#: Name -> what is changed in recipe capture; all of it scored on the first cut, what `OPEN` names on the other two of 8
#: experts.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain + threshold": {"clustering": "marks", "shared_by": "contribution", "token_power": 0.0},
    "ours, fixed number": {"selection": "top_k"},
    "ours, fixed number, no intercept (stock)": {"selection": "top_k", "intercept": False},
    "ours, no intercept": {"intercept": False},
    "ours, tokens weighed as they are": {"token_power": 0.0},
    "ours, shared by contribution": {"shared_by": "contribution"},
    "ours, shared count per layer": {"shared": None},
}
OPEN = ("ours, tokens weighed as they are", "ours, shared count per layer")
#: Row -> recipe.
ROWS = {"plain": "plain", "cmoe-paper": "cmoe-paper", "ours": "capture"}
HELD_OUT_PER_DOMAIN = 30


@dataclass(frozen=True)
class Subject:
    """A dense model, the text it is calibrated on, and the held-out rows of ids with their bytes."""

    name: str
    model: Path
    calibration: tuple[Path, ...]
    rows: list[list[int]]
    num_bytes: int

    @property
    def facts(self) -> dict[str, int]:
        """What is scored, for reports."""
        return {"num_documents": len(self.rows), "num_tokens": sum(len(row) - 1 for row in self.rows)}


def subject(name: str, shared: Path, work: Path) -> Subject:
    if name == "stories3M":
        model, stories = shared / "models" / "stories3M", shared / "text" / "stories"
        context = read_folder(model).context_tokens
        texts = [d.text for d in read_documents([stories / "ts_heldout.jsonl"], context, "--held-out")]
        calibration: tuple[Path, ...] = (stories / "ts_train.jsonl",)
    else:
        model = QUARTET
        calibration, texts = _quartet_texts(shared / "text", work / "quartet-text")
    return Subject(
        name,
        model,
        calibration,
        *encode_all(read_folder(model).tokenizer, texts, read_folder(model).context_tokens, None),
    )


def _quartet_texts(texts: Path, folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    """Training documents of quartet's four domains, written below `folder`, and held-out ones it never saw."""
    spec = importlib.util.spec_from_file_location("quartet_corpus", QUARTET / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpus)
    held_out: list[str] = []
    for domain in corpus.DOMAINS:
        train, held = corpus.documents(texts, domain)
        (folder / domain).mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"text": text}) + "\n" for text in random.Random(0).sample(train, 1500))
        (folder / domain / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        held_out += random.Random(0).sample(held, HELD_OUT_PER_DOMAIN)
    return (folder,), held_out


class Bench:
    """Rows kept below `work`; each is computed once."""

    def __init__(self, subject: Subject, work: Path) -> None:
        self.subject, self.work = subject, work

    def row(self, name: str, cut: Cut | None, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        slug = "".join(c if c.isalnum() else "-" for c in f"{self.subject.name} {label(cut)} {name} {seed}")
        path = self.work / "rows" / f"{slug}.json"
        if path.exists():
            return
        started = time.monotonic()
        fields = {"model": self.subject.name, "cut": label(cut), "row": name, "seed": seed}
        fields |= make() | {"seconds": round(time.monotonic() - started, 1)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields))
        print(fields, flush=True)

    def score(self, model: Any, control: RoutingPolicy | None = None, metered: bool = True) -> dict[str, Any]:
        meter = AgreementMeter() if metered else None
        score = score_rows(model, self.subject.rows, meter, control=control)
        row = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte(self.subject.num_bytes)}
        if meter is not None:
            routed_by = "control" if control else "path" if model.config.routing == "path" else "gate"
            row["active_share"] = meter.active_share
            row |= meter.figures().get(f"{routed_by}_vs_oracle", {})
        return row

    def converted(self, recipe: Any, cut: Cut, seed: int, change: dict[str, Any]) -> Any:
        experts, shared, active = cut
        fields: dict[str, Any] = {"experts": experts, "shared": shared, "active": active}
        if "shared" in change:
            fields |= {"shared": None, "active": shared + active}
        method: dict[str, Any] = {name: value for name, value in change.items() if name != "shared"} | {"seed": seed}
        out = self.work / f"{self.subject.name}-checkpoint"
        shutil.rmtree(out, ignore_errors=True)
        options = ConvertOptions(
            recipe=recipe,
            **method,
            model=self.subject.model,
            out=out,
            calibration=self.subject.calibration,
            restart=True,
            **fields,
        )
        convert(options)
        model = load_any(read_folder(out))
        shutil.rmtree(out)
        return model

    def cell(self, cut: Cut, seed: int) -> None:
        """All rows of one cut and seed."""
        for row, recipe in ROWS.items():
            model = _Lazy(lambda recipe=recipe: self.converted(recipe, cut, seed, {}))
            self.row(row, cut, seed, lambda model=model: self.score(model()))
            if recipe == "cmoe-paper":
                continue
            self.row(f"oracle of {row}", cut, seed, lambda model=model: self.score(model(), OraclePolicy()))
            if row == "ours":
                self.row("random", cut, seed, lambda model=model: self.score(model(), RandomPolicy(seed)))
                self.row("static", cut, seed, lambda model=model: self._static(model()))

    def _static(self, model: Any) -> dict[str, Any]:
        cut = model.config.cuts[0]
        share = (cut.num_shared + cut.num_active) / (cut.num_shared + cut.num_routed)
        with static_mask(model):
            return self.score(model, metered=False) | {"active_share": share}

    def variants(self, cut: Cut, seed: int) -> None:
        for name in VARIANTS if cut == CUTS[0] else OPEN:
            model = _Lazy(lambda change=VARIANTS[name]: self.converted("capture", cut, seed, change))
            self.row(name, cut, seed, lambda model=model: self._variant(model()))

    def _variant(self, model: Any) -> dict[str, Any]:
        return self.score(model) | {"shared_per_layer": [cut.num_shared for cut in model.config.cuts]}


def rows_in(work: Path, models: Collection[str], seeds: Collection[int]) -> list[dict[str, Any]]:
    """The finished rows of these models and seeds below `work`."""
    found = (json.loads(path.read_text()) for path in sorted((work / "rows").glob("*.json")))
    return [row for row in found if row["model"] in models and row["seed"] in seeds]


class _Lazy:
    """Makes its value when first asked."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made = make, False
        self._value: Any = None

    def __call__(self) -> Any:
        if not self._made:
            self._value, self._made = self._make(), True
        return self._value


def run(names: list[str], seeds: list[int], shared: Path, work: Path) -> Iterator[Subject]:
    for name in names:
        one = subject(name, shared, work)
        bench = Bench(one, work)
        dense = _Lazy(lambda one=one: load_any(read_folder(one.model)))
        bench.row("dense", None, 0, lambda bench=bench, dense=dense: bench.score(dense(), metered=False))
        for cut in CUTS:
            for seed in seeds:
                bench.cell(cut, seed)
                if cut[0] == CUTS[0][0]:
                    bench.variants(cut, seed)
        yield one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="folder with models/stories3M and text")
    parser.add_argument("--models", nargs="+", default=["stories3M", "quartet"], choices=["stories3M", "quartet"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/conversion"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_transformers()
    subjects = list(run(args.models, args.seeds, args.shared_folder, args.work))
    rows = rows_in(args.work, args.models, {0, *args.seeds})
    facts = {subject.name: subject.facts for subject in subjects}
    recipes = {name: vars(recipe) for name, recipe in RECIPES.items()}
    write_report(rows, facts, recipes, surroundings("conversion", ("transformers",)), args.out)


if __name__ == "__main__":
    main()

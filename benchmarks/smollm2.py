"""A real language model: SmolLM2-135M converted and decoupled, beside its dense parent and every control.

    python -m benchmarks.smollm2 --parent DIR --shared-folder ../shared [--cuts S3A3E8] [--seeds 0 1 2] [--part free]

free: each cut by the default recipe, decoupled by the defaults, with every control of `pregate evaluate`, on the test
text of WikiText-2 and of GSM8K. gates: the cut by gates alone, with the controls for seed 0. paper: CMoE's own recipe.
router: the decoupled checkpoint's path router tuned alone on the model's output, every weight the parent's. tuned: the
decoupled checkpoint tuned, with the controls. shares: what of the FFN runs on each folder of text, with thresholds that
follow it and with fixed ones. report: the tables again.

Calibrated, trained and tuned on fiction, nonfiction, GSM8K's training and WikiText-2's validation text, tuned on as
many characters of each. Checkpoints and finished rows are kept in --work, so that the same command goes on, and hours
can be spread; a row that smollm2.json in --out holds already is not made again, so that machines can be, too.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion import Subject
from benchmarks.cuts import Cut, cut_of, label
from benchmarks.smollm2_report import write_report
from benchmarks.surroundings import surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.agreement import AgreementMeter
from pregate.convert.measure.control_table import (
    DENSE,
    LINEAR,
    ORACLE,
    PAPER,
    PATH,
    RANDOM,
    STATIC,
    control_rows,
    own_name,
)
from pregate.convert.measure.evaluate import EvaluateOptions, evaluate
from pregate.convert.measure.scored_text import ScoredText
from pregate.convert.measure.scoring import Score, score_rows
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import RichProgress
from pregate.convert.text.documents import draw_documents, read_documents
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model.checkpoint import read_manifest
from pregate.model.folder import read_folder
from pregate.model.quiet import quiet_transformers

TESTS = {"WikiText-2": "wiki/wikitext-2-test.txt", "GSM8K": "math/gsm8k-test.jsonl"}
#: Of each folder of text what is scored: of those with a part for training, the other.
FOLDERS = {"math": TESTS["GSM8K"], "wiki": TESTS["WikiText-2"], "stories": "stories/ts_heldout.jsonl"} | {
    name: name for name in ("fiction", "nonfiction", "verse")
}


def tests_of(parent: Path, shared_folder: Path, num_tokens: int) -> dict[str, Subject]:
    """The first `num_tokens` of each test text, by name."""
    folder, found = read_folder(parent), {}
    for name, file in TESTS.items():
        text = ScoredText.read(folder, (shared_folder / "text" / file,), num_tokens, 0)
        found[name] = Subject(name, parent, (), text.rows, text.num_bytes)
    return found


class SmolLM2:
    """Checkpoints and rows of one parent below `work`; each is made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.progress = args, args.work, RichProgress()
        self.work.mkdir(parents=True, exist_ok=True)
        text = args.shared_folder / "text"
        wiki = sorted((text / "wiki").glob("*valid*"))
        self.text: tuple[Path, ...] = (
            text / "fiction",
            text / "nonfiction",
            text / "math" / "gsm8k-train.jsonl",
            *wiki,
        )

    def checkpoint(self, cut: Cut, kind: str, seed: int) -> Path:
        """The folder of a checkpoint: layerwise, cmoe-paper, path, router or tuned."""
        out = self.work / f"{label(cut)}-{kind}-{seed}"
        if out.exists():
            return out
        experts, shared, active = cut
        if kind in ("layerwise", "cmoe-paper"):
            recipe: Any = "capture" if kind == "layerwise" else kind
            convert(ConvertOptions(self.args.parent, out, experts, shared, active, self.text, recipe=recipe, seed=seed))
        elif kind == "path":
            source = self.checkpoint(cut, "layerwise", seed)
            decouple(DecoupleOptions(source, out, self.text, seed=seed, **self.args.decouple), self.progress)
        else:
            source = self.checkpoint(cut, "path", seed)
            text = (self.tuning_text(seed),)
            fields: dict[str, Any] = {
                "model": source,
                "out": out,
                "text": text,
                "teacher": self.args.parent,
                "seed": seed,
            }
            alone = {"ffn": False, "backbone": False} if kind == "router" else {}
            tune(TuneOptions(**fields | alone | self.args.tune), self.progress)
        return out

    def tuning_text(self, seed: int) -> Path:
        """A folder with --tune-chars of each source: `tune` takes text as it comes, of which books are nine tenths."""
        folder = self.work / f"tuning-{seed}-{self.args.tune_chars}"
        folder.mkdir(parents=True, exist_ok=True)
        for source in self.text:
            left, lines = self.args.tune_chars, []
            for document in draw_documents(read_documents((source,), 512, "--shared-folder"), seed):
                if left <= 0:
                    break
                lines.append(json.dumps({"text": document.text}) + "\n")
                left -= len(document.text)
            (folder / f"{source.stem}.jsonl").write_text("".join(lines))
        return folder

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every row there is by its name: those of --out's smollm2.json, and those that --work adds or has anew."""
        results = self.args.out / "smollm2.json"
        found = json.loads(results.read_text())["rows"] if results.exists() else []
        found += [json.loads(path.read_text()) for path in (self.work / "rows").glob("*.json")]
        named = {row_name(row): row for row in found}
        return {name: named[name] for name in sorted(named)}

    def lacks(self, cut: Cut, kind: str, seed: int, texts: Iterable[str]) -> bool:
        """Whether any of these rows is still to be made."""
        fields = {"cut": label(cut), "kind": kind, "seed": seed, "tokens": self.args.tokens}
        return not self.rows().keys() >= {row_name(fields | {"text": text}) for text in texts}

    def row(self, cut: Cut, kind: str, seed: int, text: str, make: Callable[[], dict[str, Any]]) -> None:
        fields: dict[str, Any] = {"cut": label(cut), "kind": kind, "seed": seed, "text": text}
        fields["tokens"] = self.args.tokens
        if not self.lacks(cut, kind, seed, (text,)):
            return
        path = self.work / "rows" / f"{row_name(fields)}.json"
        started = time.monotonic()
        fields |= {
            name: value for name, value in make().items() if name not in ("model", "text")
        }  # this machine's paths
        if kind in ("router", "tuned"):
            fields["tuning"] = _tuning(self.checkpoint(cut, kind, seed))
        fields |= {"seconds": round(time.monotonic() - started, 1), "made": made_on()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fields))
        print(path.stem, fields["perplexity"], flush=True)

    def score(self, cut: Cut, kind: str, seed: int, controls: bool = False) -> None:
        for name, file in TESTS.items():
            made = lambda file=file: evaluate(  # noqa: E731
                EvaluateOptions(
                    self.checkpoint(cut, kind, seed),
                    (self.args.shared_folder / "text" / file,),
                    max_tokens=self.args.tokens,
                    controls=controls,
                    parent=self.args.parent if controls else None,
                ),
                self.progress,
            )
            self.row(cut, kind, seed, name, made)

    def free(self, cut: Cut, seed: int) -> None:
        self.score(cut, "path", seed, controls=True)

    def gates(self, cut: Cut, seed: int) -> None:
        if seed:
            self.score(cut, "layerwise", seed)
        else:
            self.beside(cut, "layerwise", seed, (STATIC, RANDOM, PAPER, LINEAR, ORACLE))

    def paper(self, cut: Cut, seed: int) -> None:
        self.score(cut, "cmoe-paper", seed)

    def router(self, cut: Cut, seed: int) -> None:
        self.beside(cut, "router", seed, (PATH,))

    def tuned(self, cut: Cut, seed: int) -> None:
        self.beside(cut, "tuned", seed, (LINEAR, PATH, ORACLE))

    @torch.no_grad()
    def beside(self, cut: Cut, kind: str, seed: int, controls: tuple[str, ...]) -> None:
        """Rows of a checkpoint beside its dense parent and these controls alone: every one is a pass over the text."""
        if not self.lacks(cut, kind, seed, TESTS):
            return
        folder = read_folder(self.checkpoint(cut, kind, seed))
        model = load_any(folder)
        for name, file in TESTS.items():
            text = ScoredText.read(folder, (self.args.shared_folder / "text" / file,), self.args.tokens, 0)

            def made(name: str = name, text: ScoredText = text) -> dict[str, Any]:
                dense = self._parent(name, text.num_tokens)
                table = control_rows(model, text.rows, text.num_bytes, dense, 0, self.progress, controls)
                own: dict[str, Any] = dict(table[own_name(model)])
                return own | {"routing": model.config.routing, "num_documents": len(text.rows), "controls": table}

            self.row(cut, kind, seed, name, made)

    def _parent(self, name: str, num_tokens: int) -> Any:
        """What the dense parent scored of a text, where a row says it already; else the parent."""
        for found in self.rows().values():
            if (found["text"], found["tokens"]) == (name, self.args.tokens) and "controls" in found:
                return Score(math.log(found["controls"][DENSE]["perplexity"]) * num_tokens, num_tokens)
        return load_any(read_folder(self.args.parent))

    @torch.no_grad()
    def shares(self, cut: Cut, seed: int) -> None:
        """The active share of each folder of text, with the thresholds that follow it and as they were set."""
        if not any(self.lacks(cut, f"share-{kind}", seed, FOLDERS) for kind in ("held", "fixed")):
            return
        path = self.checkpoint(cut, "path", seed)
        model = load_any(read_folder(path))
        for folder, file in FOLDERS.items():
            files = (self.args.shared_folder / "text" / file,)
            texts = ScoredText.read(read_folder(path), files, self.args.tokens, 0)
            for kind in ("held", "fixed"):
                computer = model.path_computer
                if kind == "fixed":
                    computer.router.share_control = None
                self.row(cut, f"share-{kind}", seed, folder, lambda texts=texts: _share(model, texts))
                model.forget_path_computer()


def row_name(row: dict[str, Any]) -> str:
    """What a row is of, as its file is called."""
    return f"{row['cut']}-{row['kind']}-{row['seed']}-{row['text']}-{row['tokens']}"


def made_on() -> dict[str, str]:
    """When and on what a row is made: rows of one table may be of several machines."""
    around = surroundings("smollm2")
    return {"date": around["date"], "cpu": around["hardware"]["cpu"], "torch": around["versions"]["torch"]}


def _share(model: Any, text: ScoredText) -> dict[str, Any]:
    meter = AgreementMeter(compares=False)
    score = score_rows(model, text.rows, meter)
    return {"perplexity": round(score.perplexity, 4), "active_share": round(meter.active_share, 4)}


def _tuning(path: Path) -> dict[str, Any]:
    """What a tuned checkpoint's manifest says of its tuning; the texts it names are of this machine."""
    manifest = read_manifest(path)
    return {
        "options": {k: v for k, v in manifest.options["tune"].items() if k not in ("model", "out", "text", "teacher")}
    } | {k: v for k, v in manifest.figures["tune"].items() if "imbalance" not in k}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, required=True, help="SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("--shared-folder", type=Path, required=True, help="folder with text")
    parser.add_argument(
        "--part", default="free", choices=["free", "gates", "paper", "router", "tuned", "shares", "report"]
    )
    parser.add_argument("--cuts", type=cut_of, nargs="+", default=[cut_of("S3A3E8")])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens scored of each text")
    parser.add_argument("--decouple", type=json.loads, default={}, help="options of decouple, as JSON")
    parser.add_argument("--tune-chars", type=int, default=1_000_000, help="characters of each source to tune on")
    parser.add_argument("--tune", type=json.loads, default={}, help="options of tune, as JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_transformers()
    bench = SmolLM2(args)
    if args.part != "report":
        for cut in args.cuts:
            for seed in args.seeds:
                getattr(bench, args.part)(cut, seed)
    write_report(list(bench.rows().values()), surroundings("smollm2", ("transformers",)), args.out)


if __name__ == "__main__":
    main()

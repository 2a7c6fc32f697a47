"""Paths fixed before the model runs, against gates in every layer: without training the model, and after tuning it.

    python -m benchmarks.decoupling --shared-folder ../shared [--models stories3M] [--part free]

Training-free: every cut of `CUTS` by the default recipe, routed by its gates, by a path router, by one index for all
layers (experts renumbered first, so that equal numbers go together), at random and by the oracle. Tuned: the cuts of
`TUNED`, each for as many tokens, with the same loss: the dense parent, the layer-wise model, the path model, and one
expert per domain (Read-ME). Every twentieth training document is kept for early stopping and used for nothing else.
Held-out documents are scored by the protocol of `convert/measure/scoring.py`. A finished row is kept in --work and an
interrupted tuning goes on, so the same command again finishes the rest; the results are written of what is there.
Processes that are given different --rows may fill one folder at once, when its checkpoints are there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion import Bench, rows_in, subject
from benchmarks.cuts import Cut, label
from benchmarks.decoupling_report import ALONE, FREE, write_report
from benchmarks.surroundings import surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.domains.options import ReadMeOptions
from pregate.convert.domains.run import read_me
from pregate.convert.files.streamed import load_any
from pregate.convert.measure.controls import OraclePolicy, RandomPolicy
from pregate.convert.paths.decouple import DecoupleOptions, decouple
from pregate.convert.progress import Progress, RichProgress
from pregate.convert.text.documents import read_documents, text_files
from pregate.convert.tune.options import TuneOptions
from pregate.convert.tune.run import tune
from pregate.model.folder import read_folder
from pregate.model.layers import RoutingPolicy
from pregate.model.quiet import quiet_transformers

CUTS: tuple[Cut, ...] = ((8, 3, 3), (8, 2, 2), (8, 1, 1), (16, 2, 2))
TUNED: dict[str, tuple[Cut, ...]] = {"stories3M": ((8, 3, 3), (8, 2, 2)), "quartet": ((8, 3, 3),)}
DOMAINS = {
    "stories3M": ("stories", "fiction", "nonfiction", "verse", "math", "wiki"),
    "quartet": ("fiction", "nonfiction", "verse", "math"),
}
#: Row -> the checkpoint that is tuned for it.
TUNED_ROWS = {"path router tuned": "path", "layer-wise tuned": "layerwise", "Read-ME tuned": "read-me"}
VALIDATION_EVERY = 20
#: As many as the paper's eight rounds of a hundred.
READ_ME_ROUTER_STEPS = 800


class Decoupling:
    """One model's rows and the checkpoints they need, below `work`; each is made once."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args = args
        self.shared_folder: Path = args.shared_folder
        self.subject = subject(name, args.shared_folder, args.work)
        self.bench = Bench(self.subject, args.work)
        self.folder: Path = args.work / name
        self.progress: Progress = RichProgress()
        self.fit, self.validation = self._split()

    def _split(self) -> tuple[Path, Path]:
        """The training text without, and the part of it for, validation: folders of one file per domain."""
        fit, validation = self.folder / "text" / "fit", self.folder / "text" / "validation"
        for path in text_files(self.subject.calibration, "--text"):
            domain = "stories" if self.subject.name == "stories3M" else path.parent.name
            if (validation / f"{domain}.jsonl").exists():
                continue
            texts = [d.text for d in read_documents([path], 10**9, "--text")]
            for folder, kept in (
                (fit, lambda i: i % VALIDATION_EVERY),
                (validation, lambda i: not i % VALIDATION_EVERY),
            ):
                folder.mkdir(parents=True, exist_ok=True)
                lines = (json.dumps({"text": text}) + "\n" for i, text in enumerate(texts) if kept(i))
                (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
        return fit, validation

    def checkpoint(self, cut: Cut, kind: str) -> Path:
        """The folder of a cut's checkpoint: layerwise, path, single (one index) or read-me; made when first asked."""
        folder, seed = self.folder / label(cut), self.args.seed
        out = folder / kind
        if out.exists():
            return out
        folder.mkdir(parents=True, exist_ok=True)
        experts, shared, active = cut
        if kind == "layerwise":
            convert(ConvertOptions(self.subject.model, out, experts, shared, active, (self.fit,), seed=seed))
        elif kind == "read-me":
            domains, share = self._domains(), (shared + active) / experts
            distilled = ReadMeOptions(
                model=self.subject.model,
                out=out,
                domains=domains,
                active_share=share,
                rounds=1,
                steps=0,
                dim=128,
                router_steps=READ_ME_ROUTER_STEPS,
                pool_tokens=200_000,  # as decouple's
                seed=seed,
            )
            read_me(distilled, self.progress)
        else:
            heads = "single" if kind == "single" else "independent"
            source = self.checkpoint(cut, "layerwise")
            decouple(DecoupleOptions(source, out, (self.fit,), seed=seed, heads=heads), self.progress)
        return out

    def _domains(self) -> tuple[Path, ...]:
        """A domain's training text where the model has one, else all there is: it is none of the model's."""
        own = {path.stem: path for path in sorted(self.fit.iterdir())}
        return tuple(own[n] if n in own else self.shared_folder / "text" / n for n in DOMAINS[self.subject.name])

    def training_free(self) -> None:
        """Every cut's rows without training of the model."""
        self._row("dense", None, lambda: self._score(self.subject.model))
        for cut in CUTS:
            self._row("layer-wise", cut, lambda cut=cut: self._score(self.checkpoint(cut, "layerwise")))
            self._row("path router", cut, lambda cut=cut: self._score(self.checkpoint(cut, "path")))
            self._row("one index", cut, lambda cut=cut: self._score(self.checkpoint(cut, "single")))
            for name, policy in {"random": RandomPolicy(self.args.seed), "oracle": OraclePolicy()}.items():
                layerwise = lambda cut=cut, policy=policy: self._score(self.checkpoint(cut, "layerwise"), policy)  # noqa: E731
                self._row(name, cut, layerwise)

    def tuned(self) -> None:
        """The rows of models tuned alike, and what Read-ME's cut is before."""
        self._row("dense tuned", None, lambda: self._tuned(self.subject.model, "dense"))
        self._row(
            ALONE, None, lambda: self._tuned(self.subject.model, "dense-alone", {"teacher": None, "kl_share": 0.0})
        )
        for cut in TUNED[self.subject.name]:
            for row, kind in TUNED_ROWS.items():
                self._row(
                    row,
                    cut,
                    lambda cut=cut, kind=kind: self._tuned(self.checkpoint(cut, kind), f"{label(cut)}-{kind}"),
                )
            self._row("Read-ME", cut, lambda cut=cut: self._score(self.checkpoint(cut, "read-me")))

    def _row(self, name: str, cut: Cut | None, make: Any) -> None:
        if self.args.rows and name not in self.args.rows:
            return
        self.bench.row(name, cut, self.args.seed, make)

    def _score(self, path: Path, control: RoutingPolicy | None = None) -> dict[str, Any]:
        model = load_any(read_folder(path))
        routed = hasattr(model, "routed_mlps")
        row = self.bench.score(model, control, metered=routed)
        return row if routed else row | {"active_share": 1.0}

    def _tuned(self, source: Path, name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        args, changes = self.args, changes or {}
        stop = {"patience": args.patience, "eval_every": args.eval_every}
        out = self.tune(source, self.folder / "tuned" / name, stop | changes)
        kept = ("tokens", "steps", "best_step", "seconds", "cpu_seconds", "validation_perplexity_after")
        return self._score(out) | {name: tune_figures(out)[name] for name in kept}

    def tune(self, source: Path, out: Path, changes: dict[str, Any]) -> Path:
        """Tune `source` into `out` by the defaults but for `changes`, against the dense parent, unless it is there."""
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            fields = {"model": source, "out": out, "text": (self.fit,), "validation": (self.validation,)}
            fields |= {"teacher": self.subject.model, "tokens": self.args.tokens, "seed": self.args.seed}
            tune(TuneOptions(**fields | changes), self.progress)
        return out


def tune_figures(path: Path) -> dict[str, Any]:
    """What the manifest of a tuned checkpoint says came of it."""
    return json.loads((path / "manifest.json").read_text())["figures"]["tune"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="folder with models/stories3M and text")
    parser.add_argument("--models", nargs="+", default=list(TUNED), choices=list(TUNED))
    parser.add_argument("--part", default="all", choices=["all", "free", "tuned", "report"])
    parser.add_argument("--rows", nargs="+", choices=["dense", *FREE, "dense tuned", ALONE, "Read-ME", *TUNED_ROWS])
    parser.add_argument("--tokens", type=int, default=1_500_000, help="tokens every tuned model is tuned on")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between two looks at the validation text")
    parser.add_argument("--patience", type=int, default=4, help="looks without a better one that end a tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/decoupling"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_transformers()
    facts = {}
    for name in args.models:
        one = Decoupling(name, args)
        facts[name] = one.subject.facts
        if args.part in ("all", "free"):
            one.training_free()
        if args.part in ("all", "tuned"):
            one.tuned()
    rows = rows_in(args.work, args.models, {args.seed})
    options = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    write_report(rows, facts, options, surroundings("decoupling", ("transformers",)), args.out)


if __name__ == "__main__":
    main()

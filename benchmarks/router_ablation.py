"""What a path router's options are worth: shape, size, window, embedding, target and gate, one changed at a time.

    python -m benchmarks.router_ablation --shared-folder ../shared
    python -m benchmarks.router_ablation --shared-folder ../shared --parent DIR     # of SmolLM2-135M-Instruct

Cuts stories3M by the default recipe, S3A3E8 and S2A2E8, and S3A3E8 once more with a fixed number of experts per token,
for which the paper's losses, softmax gates and DSelect-k were made; SmolLM2, S3A3E8 (below the --work of
`benchmarks.smollm2`, whose layer-wise checkpoint it is). Collects what routers learn from once for each; trains every
variant for the same number of steps, the ones it turns on with several seeds, and scores it on text that nothing was
trained on, with thresholds that follow a text and with fixed ones: perplexity, and the share of picks in common with an
oracle's on the same hidden states. For one index the experts are renumbered first, as `pregate decouple` does. Writes
results/router_ablation[_smollm2].json and .md of the rows there are. Targets, a finished row and a training as far as
it came are kept in --work, so the same command goes on, and processes for different --cuts may fill one folder.
Training and scoring only, no weight of the model is tuned.
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from benchmarks.conversion import Bench, Subject, rows_in, subject
from benchmarks.cuts import Cut
from benchmarks.router_ablation_report import write_report
from benchmarks.router_variants import REFERENCES, Variant, variants_of
from benchmarks.smollm2 import SmolLM2, tests_of
from benchmarks.surroundings import surroundings
from pregate.base.choices import Selection
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.files.partial import open_partial
from pregate.convert.files.work_folder import fingerprint
from pregate.convert.measure.controls import OraclePolicy
from pregate.convert.paths.alignment import align_experts
from pregate.convert.paths.decouple import DecoupleOptions, read_rows, train_router
from pregate.convert.paths.size import sized
from pregate.convert.paths.targets import TargetPool, collect_targets
from pregate.convert.paths.wanted_router import routed_with
from pregate.convert.progress import RichProgress
from pregate.model import RoutedForCausalLM
from pregate.model.config import RoutedConfig
from pregate.model.file_hashes import short_digest
from pregate.model.folder import read_folder
from pregate.model.quiet import quiet_transformers
from pregate.model.router_flops import router_flops

#: Cut and selection, by the name of its table.
CUTS: dict[str, tuple[Cut, Selection]] = {
    "S3A3E8": ((8, 3, 3), "threshold"),
    "S2A2E8": ((8, 2, 2), "threshold"),
    "S3A3E8-fixed": ((8, 3, 3), "top_k"),
}


@dataclass(frozen=True)
class Source:
    """Of one model: its layer-wise checkpoint of a cut, the text routers learn on, and what is scored, by name."""

    name: str
    layerwise: Callable[[str], Path]
    text: tuple[Path, ...]
    tests: dict[str, Subject]


def stories(args: Namespace, work: Path) -> Source:
    """stories3M, cut below `work`."""
    one = subject("stories3M", args.shared_folder, work)

    def layerwise(name: str) -> Path:
        out, ((experts, shared, active), selection) = work / name / "layerwise", CUTS[name]
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            convert(ConvertOptions(one.model, out, experts, shared, active, one.calibration, selection=selection))
        return out

    return Source("stories3M", layerwise, one.calibration, {"stories": one})


def smollm2(args: Namespace) -> Source:
    """The model in --parent, cut where `benchmarks.smollm2` keeps its checkpoints."""
    bench = SmolLM2(args)
    return Source(
        "SmolLM2",
        lambda name: bench.checkpoint(CUTS[name][0], "layerwise", 0),
        bench.text,
        tests_of(args.parent, args.shared_folder, args.tokens),
    )


class Ablation:
    """One cut of a model, what its routers learn from, and its rows; all below `work`."""

    def __init__(self, source: Source, name: str, work: Path, changes: dict[str, Any]) -> None:
        self.source, self.name, self.work, self.progress = source, name, work, RichProgress()
        self.cut, selection = CUTS[name]
        self.variants = variants_of(source.name, selection)
        given = DecoupleOptions(source.layerwise(name), work / "unused", source.text, **changes)
        self.options = sized(given, RoutedConfig.from_pretrained(given.model))

    @cached_property
    def model(self) -> RoutedForCausalLM:
        return RoutedForCausalLM.from_pretrained(self.options.model, dtype=torch.float32).eval()

    @cached_property
    def pool(self) -> TargetPool:
        rows = read_rows(self.options, read_folder(self.options.model))
        known = self._known() | {"text": short_digest(rows)}
        with open_partial(self.work / self.name / "targets", known, len(rows), False, "document") as partial:
            return collect_targets(self.model, rows, self.progress, partial=partial)

    def _known(self) -> dict[str, Any]:
        return fingerprint(self.options.describe(), {}, torch.device("cpu"))

    @cached_property
    def aligned(self) -> tuple[RoutedForCausalLM, TargetPool]:
        """The model with its experts renumbered so that equal numbers go together, and the pool of it."""
        model = deepcopy(self.model)
        return model, align_experts(model, self.pool)

    def references(self) -> None:
        for name, control in zip(REFERENCES, (None, OraclePolicy()), strict=True):
            self._row(name, 0, lambda control=control: {"scores": self._scores(self.model, control)})

    def variant(self, variant: Variant, seed: int) -> None:
        self._row(variant.label, seed, lambda: self._trained(variant, seed))

    def _row(self, row: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        bench = Bench(replace(next(iter(self.source.tests.values())), name=self.source.name), self.work)
        bench.row(f"{self.name} {row}", self.cut, seed, lambda: {"table": self.name, "of": row} | make())

    def _scores(self, model: RoutedForCausalLM, control: Any = None) -> dict[str, Any]:
        return {name: Bench(test, self.work).score(model, control) for name, test in self.source.tests.items()}

    def _trained(self, variant: Variant, seed: int) -> dict[str, Any]:
        """Train and score one router."""
        options = replace(self.options, seed=seed, **variant.change)
        model, pool = self.aligned if options.heads == "single" else (self.model, self.pool)
        started, known = time.monotonic(), fingerprint(options.describe(), {}, torch.device("cpu"))
        out = self.work / self.name / "".join(c if c.isalnum() else "-" for c in f"{variant.label} {seed}")
        assert options.steps is not None
        with open_partial(out, known, options.steps, False, "step") as partial:
            trained, _ = train_router(model, shortened(pool, options), options, self.progress, partial)
        seconds = time.monotonic() - started
        routed = routed_with(model, trained, options)
        router = routed.path_router
        assert router is not None
        scores = fixed = self._scores(routed)
        if router.share_control is not None:
            router.share_control = None
            routed.forget_path_computer()
            fixed = self._scores(routed)
        flops = router_flops(options.shape(), model.config.cuts, model.config.selection)
        counted = {"flops_per_token": flops, "train_s": round(seconds, 1)}
        return {"scores": scores, "fixed": fixed} | counted


def shortened(pool: TargetPool, options: DecoupleOptions) -> TargetPool:
    """The first documents of a pool, of at most `options.pool_tokens` together; it may have been made with more."""
    assert options.pool_tokens is not None
    kept = sum(total <= options.pool_tokens for total in accumulate(map(len, pool.rows)))
    return replace(pool, rows=pool.rows[:kept], mass=pool.mass[:kept])


def fill(ablations: Sequence[Ablation], names: Sequence[str] | None) -> Iterator[None]:
    """Every row that is not there (or those called `names`): all variants with one seed first, then more seeds.

    Gives after each, so that what there is can be written.
    """
    for ablation in ablations:
        ablation.references()
        yield
    wanted = [(a, v) for a in ablations for v in a.variants if names is None or v.label in names]
    for seed in range(max((v.num_seeds for _, v in wanted), default=0)):
        for ablation, variant in wanted:
            if seed < variant.num_seeds:
                ablation.variant(variant, seed)
                yield


def folder_of(work: Path, changes: dict[str, Any]) -> Path:
    """Where rows are kept that were made with these numbers: with no others."""
    return work / ("-".join(f"{name}-{value}" for name, value in changes.items()).replace("_", "-") or "defaults")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M and text")
    parser.add_argument("--parent", type=Path, help="SmolLM2-135M-Instruct as a Hugging Face folder: of that model")
    parser.add_argument("--cuts", nargs="+", choices=list(CUTS))
    parser.add_argument("--rows", nargs="+", help='variants to train, such as "target: the oracle\'s sets"')
    parser.add_argument("--steps", type=int, help="training steps of every router; by the model's size")
    parser.add_argument("--pool-tokens", type=int, help="tokens to learn on, at most; by the model's size")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens scored of each text (SmolLM2)")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_transformers()
    changes = {name: value for name in ("steps", "pool_tokens") if (value := getattr(args, name)) is not None}
    if args.parent:
        args.work = args.work or Path("runs/smollm2")
        work = folder_of(args.work / "router_ablation", changes | {"tokens": args.tokens})
        source, cuts, file = smollm2(args), args.cuts or ["S3A3E8"], "router_ablation_smollm2"
    else:
        work = folder_of(args.work or Path("runs/router_ablation"), changes)
        source, cuts, file = stories(args, work), args.cuts or list(CUTS), "router_ablation"
    ablations = [Ablation(source, name, work, changes) for name in cuts]
    facts = {"model": source.name, "texts": {name: test.facts for name, test in source.tests.items()}}
    facts |= {name: getattr(ablations[0].options, name) for name in ("steps", "pool_tokens")}
    around = surroundings("router_ablation", ["transformers"])
    for _ in fill(ablations, args.rows):
        write_report(rows_in(work, {source.name}, range(9)), facts, around, args.out / file)
    print((args.out / file).with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

"""Held to the reference: 16 prompts x 64 tokens, one by one and all at once, on 0 to 3 hosts, both routings.

    python -m benchmarks.served_equality --shared-folder DIR

Converts and decouples models/stories3M of that folder and prompts it with text/stories. Prints, per deployment,
positions compared and excused and the largest logit difference; then messages and bytes per step, exact paths beside
gated layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from pregate.model.modeling import RoutedForCausalLM
from pregate.model.quiet import quiet_transformers
from tests.equality import ReferenceText, Tally, reference_text, refuse_degenerate
from tests.router.serving import compare, engine_over, expert_hosts, serve

NUM_PROMPTS = 16
NUM_TOKENS = 64


def make_checkpoints(shared: Path, folder: Path) -> dict[str, Path]:
    from pregate.convert.cut.conversion import convert
    from pregate.convert.cut.options import ConvertOptions
    from pregate.convert.paths.decouple import DecoupleOptions, decouple

    text = (shared / "text" / "stories" / "ts_train.jsonl",)
    convert(ConvertOptions(shared / "models" / "stories3M", folder / "layerwise", 8, 3, 3, text))
    decouple(DecoupleOptions(folder / "layerwise", folder / "path", text))
    return {"layerwise": folder / "layerwise", "path": folder / "path"}


def candidates(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The first words of documents, 4 to 34 tokens of each."""
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        text = next(v for v in json.loads(line).values() if isinstance(v, str))
        yield tokenizer.encode(text).ids[: 4 + index % 31]


def choose_references(model: RoutedForCausalLM, prompts: Iterator[list[int]]) -> list[ReferenceText]:
    """Reference texts of the first 16 prompts that give texts which differ and do not just repeat themselves."""
    chosen: list[ReferenceText] = []
    for prompt in prompts:
        text = reference_text(model, prompt, NUM_TOKENS)
        with contextlib.suppress(ValueError):
            refuse_degenerate([*chosen, text])
            chosen.append(text)
        if len(chosen) == NUM_PROMPTS:
            return chosen
    raise ValueError(f"--text: only {len(chosen)} of {NUM_PROMPTS} prompts give texts that differ")


def measure(name: str, path: Path, text: Path, folder: Path, total: Tally) -> None:
    model = RoutedForCausalLM.from_pretrained(path).eval()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    references = choose_references(model, candidates(text, tokenizer))
    prompts = [r.prompt for r in references]
    with expert_hosts(path, 3, folder) as addresses:
        for num_hosts in range(4):
            with engine_over(path, addresses[:num_hosts]) as engine:
                for together in (False, True):
                    print(run(name, engine, prompts, references, num_hosts, together, total), flush=True)


def run(name, engine, prompts, references, num_hosts, together, total) -> str:
    tally, before, started = Tally(), totals(engine), time.perf_counter()
    compare(tally, f"{name} {num_hosts}", references, serve(engine, prompts, NUM_TOKENS, together=together))
    elapsed_s = time.perf_counter() - started
    spent = {k: v - before[k] for k, v in totals(engine).items()}
    tally.check()
    total.compared += tally.compared
    total.excused += tally.excused
    total.max_logit_difference = max(total.max_logit_difference, tally.max_logit_difference)
    steps = spent["steps"]
    return (
        f"| {name} | {num_hosts} | {'at once' if together else 'one by one'} | {tally.compared} | {tally.excused}"
        f" | {tally.max_logit_difference:.1e} | {steps} | {spent['plans'] / steps:.2f} | {spent['groups'] / steps:.2f}"
        f" | {spent['indexed_groups'] / steps:.2f} | {spent['plan_bytes'] / steps:.0f}"
        f" | {spent['group_bytes'] / steps:.0f} | {elapsed_s:.1f} |"
    )


def totals(engine) -> dict[str, int]:
    stats = [c.stats for c in engine.exchange.clients]
    names = ("plans", "groups", "indexed_groups", "plan_bytes", "group_bytes")
    return {n: sum(getattr(s, n) for s in stats) for n in names} | {"steps": engine.info()["num_steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    total = Tally()
    with tempfile.TemporaryDirectory(prefix="pregate-eq-") as name:
        folder = Path(name)
        checkpoints = make_checkpoints(args.shared_folder, folder)
        held_out = args.shared_folder / "text" / "stories" / "ts_heldout.jsonl"
        print(
            "| routing | hosts | prompts | positions | excused | max logit diff | steps | plans/step | groups/step"
            " | with index | plan bytes/step | group bytes/step | s |"
        )
        print("| --- " * 13 + "|")
        for routing, path in checkpoints.items():
            (folder / routing[:1]).mkdir(mode=0o700)
            measure(routing, path, held_out, folder / routing[:1], total)
    print(f"\n{total}")
    total.check()


if __name__ == "__main__":
    main()

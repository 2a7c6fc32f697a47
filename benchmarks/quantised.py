"""What 8-bit experts cost in quality: perplexity of one routed model with its experts held in several ways.

    python -m benchmarks.quantised --shared-folder ../shared

stories3M, S3A3E8, the linear gate, held-out stories. `int8` of the command line is measured as it runs: dynamic int8,
rows quantised too. The Triton kernels' 8-bit weights (`triton-int8`, `triton-fp8`; rows stay as they are) are measured
as what they compute: the reference over weights rounded to 8 bits and back, per row. Also the relative error of one
expert's output on random rows. Writes results/quantised.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.surroundings import surroundings
from pregate.convert.cut.conversion import convert
from pregate.convert.cut.options import ConvertOptions
from pregate.convert.measure.scoring import encode_all, score_rows
from pregate.convert.text.documents import read_documents
from pregate.kernels import reference
from pregate.kernels.cpu.ffn import LoopFFN
from pregate.kernels.cpu.packed import Int8FFN
from pregate.kernels.weights import quantise_rows, split_shared
from pregate.model.folder import read_folder
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.quiet import quiet_transformers

WEIGHT_ONLY = {"triton-int8": torch.int8, "triton-fp8": torch.float8_e4m3fn}
OUT = Path(__file__).parent / "results" / "quantised.json"


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values, scale_N = quantise_rows(weight, dtype)
    return values.float() * scale_N[:, None]


def round_model(model: RoutedForCausalLM, dtype: torch.dtype) -> None:
    """Round every expert of `model` as the kernels hold it; a shared expert slice by slice."""
    for mlp in model.routed_mlps:
        if mlp.shared is not None:
            gate_up, down = mlp.shared.gate_up_proj, mlp.shared.down_proj
            slices = [
                (rounded(g, dtype), rounded(d, dtype)) for g, d in split_shared(gate_up, down, mlp.cut.num_shared)
            ]
            gates, ups = zip(*(g.chunk(2) for g, _ in slices), strict=True)
            gate_up.copy_(torch.cat([*gates, *ups]))
            down.copy_(torch.cat([d for _, d in slices], dim=1))
        for stack in (mlp.experts.gate_up_proj, mlp.experts.down_proj) if mlp.experts is not None else ():
            for expert in stack:
                expert.copy_(rounded(expert, dtype))


def output_error(model: RoutedForCausalLM, name: str) -> float:
    """Relative error (norms) of the output of layer 0's experts on 64 normal rows each."""
    mlp = model.routed_mlps[0]
    assert mlp.experts is not None
    gate_up_RMD, down_RDM = mlp.experts.gate_up_proj, mlp.experts.down_proj
    x_TD = torch.randn(64, mlp.hidden_size, generator=torch.Generator().manual_seed(0))
    act = mlp.act_name
    ffn = Int8FFN(act) if name == "int8" else LoopFFN(act)
    error = wanted = 0.0
    for gate_up, down in zip(gate_up_RMD, down_RDM, strict=True):
        exact_TD = reference.expert_ffn(x_TD, gate_up, down, reference.activation(act))
        held = (
            (gate_up, down)
            if name == "int8"
            else (rounded(gate_up, WEIGHT_ONLY[name]), rounded(down, WEIGHT_ONLY[name]))
        )
        y_TD = ffn.dense(x_TD, ffn.stack(held[0][None], held[1][None]))
        error += float((y_TD - exact_TD).square().sum())
        wanted += float(exact_TD.square().sum())
    return (error / wanted) ** 0.5


@torch.no_grad()
def measure(path: Path, held_out: Path) -> list[dict[str, Any]]:
    context = read_folder(path).context_tokens
    texts = [document.text for document in read_documents([held_out], context, "--shared-folder")]
    held, _ = encode_all(read_folder(path).tokenizer, texts, context, None)
    rows: list[dict[str, Any]] = []
    for name in ("reference", "packed", "int8", *WEIGHT_ONLY):
        model = RoutedForCausalLM.from_pretrained(path).eval()
        error = None if name in ("reference", "packed") else round(output_error(model, name), 5)
        if name in WEIGHT_ONLY:
            round_model(model, WEIGHT_ONLY[name])
        elif name != "reference":
            model.set_experts_implementation(name)
        perplexity = score_rows(model, held).perplexity
        first = rows[0]["perplexity"] if rows else perplexity
        rows.append({"experts": name, "perplexity": perplexity, "ratio": perplexity / first, "output_error": error})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared-folder", type=Path, required=True)
    shared = parser.parse_args().shared_folder
    quiet_transformers()
    stories = shared / "text" / "stories"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routed"
        convert(ConvertOptions(shared / "models" / "stories3M", path, 8, 3, 3, (stories / "ts_train.jsonl",)))
        rows = measure(path, stories / "ts_heldout.jsonl")
    report = {**surroundings("quantised", ("transformers",)), "model": "stories3M S3A3E8, linear gate", "rows": rows}
    OUT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`pregate bench kernels`: how fast this machine runs the expert FFN, and tuning of its block sizes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
#: The whole of a quick look, in seconds per batch size.
_BUDGET_S = 1.0


@app.callback()
def _group() -> None:
    """Keep `kernels` a command of its own while it is the only one."""


@app.command()
def kernels(
    shape: Annotated[str, typer.Option(help="llama-2-7b, 1b or quartet.")] = "1b",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    expert_ffn: Annotated[str, typer.Option(help="auto, or an implementation by name.")] = "auto",
    percent: Annotated[int, typer.Option(help="Share of the FFN that is active: 25, 50 or 75.")] = 25,
    tokens: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,4,16,64,256",
    tune: Annotated[bool, typer.Option(help="Rewrite this device's block sizes first (CUDA).")] = False,
    table: Annotated[
        Path | None, typer.Option(help="File of block sizes to rewrite; the package's own if none.")
    ] = None,
) -> None:
    """Print milliseconds of the dense FFN and of the expert FFN per batch size, one thread or one GPU."""
    import torch

    from pregate.kernels import expert_ffn as entry
    from pregate.kernels.tools import bench

    chosen, sizes = bench.shape_named(shape), _batch_sizes(tokens)
    _refuse(percent, device, table, tune)
    where = torch.device(device)
    kind = entry.choose_dtype(dtype, where)
    ffn = entry.choose(expert_ffn, where, kind, act="silu", widths=(chosen.hidden, chosen.expert_width))
    if tune:
        _tune(ffn, chosen, where, kind, table)
    torch.set_num_threads(1)
    print(f"{chosen.name}, {percent} % active, {ffn.name} on {device} in {dtype_name(kind)}, ms")
    print(f"{'tokens':>8} {'dense':>9} {'experts':>9} {'times':>6}")
    with torch.inference_mode():
        for num_tokens in sizes:
            dense_ms, ours_ms = _measure(ffn, chosen, where, kind, percent, num_tokens)
            print(f"{num_tokens:8d} {dense_ms:9.3f} {ours_ms:9.3f} {dense_ms / ours_ms:6.2f}")


def _refuse(percent: int, device: str, table: Path | None, tune: bool) -> None:
    from pregate.cluster.config import DEVICES

    if percent not in (25, 50, 75):
        raise UserError.of("--percent", percent, "allowed: 25, 50, 75")
    if device not in DEVICES:
        raise UserError.of("--device", device, f"allowed: {', '.join(DEVICES)}")
    if table is not None and not tune:
        raise UserError.of("--table", table, "is only written; allowed with --tune")


def _batch_sizes(tokens: str) -> list[int]:
    try:
        sizes = [int(part) for part in tokens.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError.of("--tokens", tokens, "allowed: numbers of 1 or more with commas, like 1,16,256")
    return sizes


def _measure(ffn, shape, device, dtype, percent: int, num_tokens: int) -> tuple[float, float]:  # noqa: ANN001
    import torch

    from pregate.kernels.tools import bench

    generator = torch.Generator().manual_seed(num_tokens)
    layers = [bench.DenseLayer.random(shape, dtype, device, n) for n in range(shape.num_layers(dtype, device.type))]
    units = [layer.units(ffn) for layer in layers]
    ids_TK = bench.route("uniform", num_tokens, shape.num_routed, shape.num_active(percent), generator)
    segment = ffn.segments(ids_TK[:, None], shape.num_routed, 1).layer(0)
    x_TD = torch.randn(num_tokens, shape.hidden, generator=generator).to(device, dtype)
    runs = {
        "dense": lambda layer: layers[layer].forward(x_TD),
        "experts": lambda layer: ffn.layer(x_TD, segment, units[layer]),
    }
    taken = bench.time_ms(runs, len(layers), budget_s=_BUDGET_S, device=device)
    return taken["dense"], taken["experts"]


def _tune(ffn, shape, device, dtype, table: Path | None) -> None:  # noqa: ANN001
    if not ffn.name.startswith("triton"):
        raise UserError.of("--tune", ffn.name, "has no block sizes; allowed: the Triton kernels, with --device cuda")
    import torch

    from pregate.kernels.tools.tune_block_sizes import tune
    from pregate.kernels.triton.block_sizes import TABLE_PATH

    if dtype == torch.float32:
        raise UserError.of("--tune", "float32", "runs in fixed blocks; allowed: --dtype bfloat16 or float16")
    path = table or TABLE_PATH
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError.of("--table", path, "cannot be written; allowed: a file that can")
    tune(ffn, shape, device, dtype).save(path)
    print(f"wrote {path}")

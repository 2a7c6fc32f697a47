"""`pregate bench`: how fast this machine runs the expert FFN, how a server bears a load, how policies of caching do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import Field

from pregate.base.dtypes import dtype_name
from pregate.base.errors import UserError
from pregate.base.options import Dtype, Word, options
from pregate.cli.cache.command import cache
from pregate.cli.flags import command
from pregate.cli.load.options import LoadOptions
from pregate.cli.printed import Output
from pregate.workers.host.options import EXPERT_FFNS

app = typer.Typer(help="Measure this machine, or a server.", no_args_is_help=True)
app.command()(cache)
#: The whole of a quick look, in seconds per batch size.
_BUDGET_S = 1.0


@options()
class BenchOptions:
    """What to measure, on what."""

    shape: Annotated[str, Field(description="llama-2-7b, 1b or quartet.")] = "1b"
    device: Annotated[Literal["cpu", "cuda"], Field(description="Where.")] = "cpu"
    dtype: Annotated[Dtype | Literal["auto"], Field(description="auto: float32 on a CPU, bfloat16 on a GPU.")] = "auto"
    expert_ffn: Annotated[str, Field(description=f"One of {', '.join(EXPERT_FFNS)}.")] = "auto"
    percent: Annotated[Literal["25", "50", "75"], Field(description="Share of the FFN that is active.")] = "25"
    tokens: Annotated[str, Field(description="Batch sizes, with commas.")] = "1,4,16,64,256"
    tune: Annotated[bool, Field(description="Rewrite this device's block sizes first (CUDA).")] = False
    table: Annotated[
        Path | None, Field(description="File of block sizes to rewrite."), Word("the package's own", written=False)
    ] = None

    def __post_init__(self) -> None:
        if self.table is not None and not self.tune:
            raise UserError.of("--table", self.table, "is only written; allowed with --tune")
        _ = self.batch_sizes

    @property
    def batch_sizes(self) -> list[int]:
        """The numbers in `tokens`."""
        try:
            sizes = [int(part) for part in self.tokens.split(",")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1:
            raise UserError.of("--tokens", self.tokens, "allowed: numbers of 1 or more with commas, like 1,16,256")
        return sizes


@app.command()
@command(BenchOptions)
def kernels(options: BenchOptions) -> None:
    """Print milliseconds of the dense FFN and of the expert FFN per batch size, one thread or one GPU."""
    import torch

    from pregate.kernels import expert_ffn as entry
    from pregate.kernels.tools import bench

    chosen, where, percent = bench.shape_named(options.shape), torch.device(options.device), int(options.percent)
    kind = entry.choose_dtype(options.dtype, where)
    ffn = entry.choose(options.expert_ffn, where, kind, act="silu", widths=(chosen.hidden, chosen.expert_width))
    if options.tune:
        _tune(ffn, chosen, where, kind, options.table)
    torch.set_num_threads(1)
    print(f"{chosen.name}, {percent} % active, {ffn.name} on {where} in {dtype_name(kind)}, ms")
    print(f"{'tokens':>8} {'dense':>9} {'experts':>9} {'times':>6}")
    with torch.inference_mode():
        for num_tokens in options.batch_sizes:
            dense_ms, ours_ms = _measure(ffn, chosen, where, kind, percent, num_tokens)
            print(f"{num_tokens:8d} {dense_ms:9.3f} {ours_ms:9.3f} {dense_ms / ours_ms:6.2f}")


@app.command()
@command(LoadOptions, Output)
def serve(options: LoadOptions, output: Output) -> None:
    """Put a server under load, of a trace or at random, and print how it bears it: times, throughput, batches."""
    from pregate.cli.load import bench_serve

    bench_serve.run(options, as_json=output.json)


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

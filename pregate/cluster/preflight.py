"""What can be refused before anything starts: the model, the hosts, the ports.

What needs torch is looked at in a process of its own, so that launchers do not hold torch for as long as they serve.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

from pregate.base.errors import BY_CODE, PregateError, UnavailableError, UserError
from pregate.base.network import is_loopback
from pregate.cluster import placement
from pregate.cluster.config import ServeConfig
from pregate.model.folder import read_folder
from pregate.model.read_check import Hashes
from pregate.model.tokenizer import read_tokenizer
from pregate.router.doors.grpc_options import GrpcOptions

#: Hashing a large checkpoint from a slow disk takes minutes.
CHECK_TIMEOUT_S = 1800.0
_FITS_HERE, _WHOLE = "--fits-here", "--whole"


def check_config(config: ServeConfig, *, fits_here: bool = False, whole: bool = False) -> None:
    """Refuse a deployment that cannot come up, and with `fits_here` one whose engine finds no room on this machine.

    UserError or CheckpointError with the house's sentence. Shards are hashed by the hosts and engines that read them,
    and here only if `whole`.
    """
    if not Path(config.model).is_dir():
        raise UserError.of("--model", config.model, "no such folder; allowed: a checkpoint folder")
    if config.otlp_endpoint is not None and not _installed("opentelemetry.exporter.otlp.proto.http"):
        raise UserError.of("--otlp-endpoint", config.otlp_endpoint, "needs `pip install pregate[otel]`")
    read_folder(Path(config.model), parent=None if config.parent is None else Path(config.parent)).check("routed")
    if "torch" in sys.modules:
        check_model(config, fits_here, whole)
        return
    flags = [flag for flag, wanted in ((_FITS_HERE, fits_here), (_WHOLE, whole)) if wanted]
    command = [sys.executable, "-m", "pregate.cluster.preflight", *flags]
    try:
        done = subprocess.run(
            command, input=json.dumps(config.to_dict()), capture_output=True, text=True, check=False,
            timeout=CHECK_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"--model {config.model}: not checked within {CHECK_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise UnavailableError(f"--model {config.model}: the check failed: {(done.stderr.splitlines() or [''])[-1]}")
    failure = json.loads(done.stdout.splitlines()[-1])
    if failure:
        raise BY_CODE[failure["code"]](failure["message"])


def check_device(config: ServeConfig) -> None:
    """Refuse GPUs where there is no driver of any, without torch, which takes seconds to load and has the last word."""
    if config.device == "cuda" and config.engine_node is None and not has_gpu_driver():
        raise UserError.of("--device", config.device, "this machine has no GPU's driver; allowed here: cpu")


def has_gpu_driver() -> bool:
    """Whether there is what torch asks about GPUs: NVIDIA's library, or AMD's device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor what it is in
        return False


def check_model(config: ServeConfig, fits_here: bool = False, whole: bool = False) -> None:
    """`check_config` in this process; loads torch and transformers."""
    import torch

    from pregate.cluster.footprint import held_of_hosts, kv_cache_bytes
    from pregate.kernels import expert_ffn
    from pregate.model.checkpoint import CheckpointReader
    from pregate.router.engine.family import check_family

    reader = CheckpointReader(config.model, config.parent, hashes=Hashes.FIRST if whole else Hashes.WHILE_READ)
    config.engine_options.check_block_size(reader.config.context_tokens)
    read_tokenizer(Path(config.text_path))
    if config.hosts or config.replicas:
        cuts = reader.config.cuts
        placement.check_request(
            [cut.num_routed for cut in cuts], max(1, config.hosts), config.placement, config.replicas
        )
    if config.engine_node is None:  # else this machine computes nothing: it may have no GPU
        device = torch.device(config.device)
        widths = {reader.hidden_size, *(cut.expert_width for cut in reader.config.cuts)}
        dtype = expert_ffn.choose_dtype(config.dtype, device)
        asked, stored = config.host.expert_ffn, reader.unit_dtype
        expert_ffn.choose(asked, device, dtype, act=reader.hidden_act, widths=tuple(widths), stored=stored)
        if config.host.resident_experts is not None:
            held_of_hosts(reader, config)
        if fits_here and config.device == "cpu":  # of a GPU's memory only the engine's process finds out
            kv_cache_bytes(reader, config)
    check_family(reader.config.text_config)


def check_door(options: GrpcOptions, engine_node: str | None = None) -> None:
    """Refuse a door whose access rules, files or port cannot work on this machine. UserError names the option. Of one
    on an `engine_node` files and port are looked at there, when it starts."""
    access = options.access
    if engine_node is not None:
        if is_loopback(access.host):
            sentence = f"reached by nobody here on --engine-node {engine_node}; allowed: 0.0.0.0 or an address there"
            raise UserError.of("--host", access.host, sentence)
        return
    access.read_tls()
    access.open_tokens()
    check_port("--grpc-port", access.host, options.port)
    if options.metrics_port is not None:
        if options.metrics_port == options.port:
            raise UserError.of("--metrics-port", options.metrics_port, "is --grpc-port, too; use another")
        check_port("--metrics-port", access.host, options.metrics_port)


def check_port(option: str, host: str, port: int) -> None:
    """UserError for a port that cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server will: an old connection that lingers is no hindrance, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            sentence = f"cannot be listened on ({error.strerror}); use another"
            raise UserError.of(option, f"{port} on {host}", sentence) from error


def main() -> None:
    """Check the config on standard input; print null, or the failure's code and message."""
    try:
        check_model(ServeConfig.from_dict(json.load(sys.stdin)), _FITS_HERE in sys.argv, _WHOLE in sys.argv)
        failure = None
    except PregateError as error:
        failure = {"code": error.code, "message": error.for_command_line}
    print(json.dumps(failure))


if __name__ == "__main__":
    main()

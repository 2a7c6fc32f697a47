"""What bad input gets: one line on stderr, exit code 2, nothing started and nothing written."""

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pregate.cli.main import _app, _list_options, _spread, main
from pregate.client import connection
from pregate.convert.cut.options import RECIPES
from tests.equality import reference_text

DECOUPLE = ("--model", "TINY", "--out", "/no/such", "--text", "/no/such")


def fails(capsys, *arguments):
    """Run the command line; returns its one line of error, after what it says of its progress."""
    code = main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    *stages, line = error.splitlines()
    assert all(stage.startswith("  ") for stage in stages), error
    return line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--model", "/no/such"], "--model /no/such: no such path"),
        (["serve", "--model", "TINY", "--hosts", "6"], "--hosts 6: allowed: 0 to 5"),
        (["serve", "--model", "TINY", "--hosts", "-1"], "--hosts -1"),
        (["serve", "--model", "TINY", "--hosts", "two"], "--hosts two:"),
        (["serve", "--model", "TINY", "--placement", "spread"], "--placement spread: allowed: linear, round_robin"),
        (["serve", "--model", "TINY", "--hosts", "2", "--replicas", "0.5"], "--replicas 0.5: linear places no copies"),
        (["serve", "--model", "TINY", "--device", "cuda"], "--device cuda"),
        (["serve", "--model", "TINY", "--expert-ffn", "triton"], "--expert-ffn triton: not possible here"),
        (["serve", "--model", "TINY", "--host", "0.0.0.0"], "--host 0.0.0.0: needs --tls-cert"),
        (["serve", "--model", "TINY", "--grpc-port", "70000"], "--grpc-port 70000: allowed: 0"),
        (["serve", "--model", "TINY", "--token-file", "/no/such"], "--token-file /no/such"),
        (["serve", "--modle", "x"], "--modle"),
        (["bench", "kernels", "--shape", "13b"], "--shape 13b: allowed: llama-2-7b, 1b, quartet"),
        (["bench", "kernels", "--percent", "30"], "--percent 30: allowed: 25, 50, 75"),
        (["bench", "kernels", "--tokens", "1,0"], "--tokens 1,0: allowed"),
        (["bench", "kernels", "--device", "tpu"], "--device tpu: allowed: cpu, cuda"),
        (["bench", "kernels", "--table", "t.json"], "--table t.json: is only written; allowed with --tune"),
        (["bench", "kernels", "--tune", "--shape", "quartet"], "has no block sizes"),
        (["bench", "kernels", "--expert-ffn", "fastest"], "--expert-ffn fastest: unknown"),
        (["brew"], "brew"),
        (["generate", "--prompt", "a"], "--model, --target: give one of them"),
        (["generate", "--model", "a", "--target", "b:1", "--prompt", "a"], "--model, --target: give one of them"),
        (["generate", "--target", "nowhere", "--prompt", "a"], "--target nowhere: must be HOST:PORT"),
        (["generate", "--model", "/no/such", "--prompt", "a"], "--model /no/such: no such path"),
        (["generate", "--model", "TINY", "--prompt", "a", "--max-tokens", "0"], "--max-tokens 0"),
        (["generate", "--model", "TINY", "--prompt", "a", "--temperature", "-1"], "--temperature -1"),
        (["generate", "--model", "TINY", "--prompt", "a", "--temperature", "1e39"], "1e39: allowed: 0 to 100"),
        (["generate", "--model", "TINY", "--prompt", ""], "--prompt of 0 tokens"),
        (["generate", "--model", "TINY", "--prompt", "a", "--stop", ""], "--stop of 0 characters: must be 1 to 256"),
        (["generate", "--model", "TINY", "--prompt", "a\udcff"], "--prompt: half of a surrogate pair ('\\udcff')"),
        (["route", "--model", "TINY", "--prompt", "a\udcff"], "--prompt: half of a surrogate pair ('\\udcff')"),
        (["decouple", *DECOUPLE, "--heads", "two"], "--heads two: allowed: independent, recurrent, single"),
        (
            ["decouple", *DECOUPLE, "--gate", "dselect", "--target", "paper"],
            "--target paper: allowed with --gate dselect",
        ),
        (
            ["decouple", *DECOUPLE, "--predict", "--weights", "learned"],
            "--weights learned: allowed with --predict: one",
        ),
        (["decouple", *DECOUPLE, "--window", "0"], "--window 0: allowed: 1 or more"),
        (["decouple", *DECOUPLE, "--read-layers", "0"], "--read-layers 0: allowed: 1 or more"),
        (["decouple", *DECOUPLE, "--read-layers", "1", "--window", "9"], "--window 9: not with --read-layers"),
        (["decouple", *DECOUPLE, "--embedding", "both"], "--embedding both: allowed: own, parent"),
        (["route", "--model", "TINY", "--prompt", "a"], "make one with `pregate decouple`"),
    ],
)
def test_bad_input_is_one_line_that_names_it(capsys, layerwise_checkpoint, arguments, sentence):
    line = fails(capsys, *(layerwise_checkpoint if a == "TINY" else a for a in arguments))
    assert line.startswith("pregate: ")
    assert sentence in line


def test_a_port_in_use_is_refused_before_anything_starts(capsys, layerwise_checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(capsys, "serve", "--model", layerwise_checkpoint, "--grpc-port", port)
    assert f"--grpc-port {port} on 127.0.0.1: cannot be listened on" in line


def test_a_damaged_checkpoint_names_the_file(capsys, layerwise_checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in layerwise_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: -1 if path.suffix == ".safetensors" else None])
    assert "model.safetensors" in fails(capsys, "serve", "--model", folder)
    (folder / "manifest.json").unlink()
    assert "manifest.json: missing" in fails(capsys, "serve", "--model", folder)


def test_an_unreachable_target_is_a_failure_not_bad_input(capsys, monkeypatch):
    for name in ("_FIRST_WAIT_S", "_LONGEST_WAIT_S"):  # longer than it is tried for: no second attempt
        monkeypatch.setattr(connection, name, 100.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert main(["generate", "--target", f"127.0.0.1:{nobody.getsockname()[1]}", "--prompt", "a"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_generate_in_this_process_is_the_reference(capsys, path_checkpoint):
    import torch

    from pregate.model.modeling import RoutedForCausalLM

    assert main(["generate", "--model", str(path_checkpoint), "--prompt", "abc", "--max-tokens", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    model = RoutedForCausalLM.from_pretrained(path_checkpoint)
    ids = torch.tensor([[ord(c) - ord("!") for c in "abc"]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert result["token_ids"] == expected[0, 3:].tolist()
    assert (result["finish_reason"], result["prompt_tokens"], result["completion_tokens"]) == ("length", 3, 6)


def test_what_is_drawn_in_this_process_is_what_an_engine_draws(capsys, path_checkpoint):
    from pregate.model.modeling import RoutedForCausalLM
    from pregate.router.engine.sampling import scores
    from pregate.router.link.messages import SamplingParams

    asked = ["--prompt", "abc", "--max-tokens", "12", "--temperature", "1.5", "--top-k", "50", "--seed", "7", "--json"]
    assert main(["generate", "--model", str(path_checkpoint), *asked]) == 0
    params, prompt = SamplingParams(12, 1.5, top_k=50), [ord(c) - ord("!") for c in "abc"]
    model = RoutedForCausalLM.from_pretrained(path_checkpoint)
    text = reference_text(model, prompt, 12, lambda logits_V, at: scores(logits_V, params, 7, at))
    drawn = json.loads(capsys.readouterr().out)["token_ids"]
    assert drawn == text.tokens[: len(drawn)] and len(set(drawn)) > 6


def test_route_in_this_process(capsys, path_checkpoint):
    assert main(["route", "--model", str(path_checkpoint), "--prompt", "abc", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"]
    assert [[len(layer) for layer in token] for token in result["paths"]] == [[3, 3, 3]] * 3


def test_generate_in_this_process_and_help_stay_light(path_checkpoint):
    code = (
        "import sys; from pregate.cli.main import main\n"
        "assert main(['--help']) == 0 and not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        f"assert main(['generate', '--model', {str(path_checkpoint)!r}, '--prompt', 'a', '--max-tokens', '1']) == 0\n"
        "ours = ('pregate.router.engine.engine', 'pregate.workers.host.host')\n"
        "bad = [m for m in sys.modules if m in ('ray', 'grpc', *ours)]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_list_options_take_several_values():
    lists = _list_options(_app(["convert", "bench"]))
    assert {"--calibration", "--text"} <= lists
    assert _spread(["--text", "a", "b", "--seed", "1"], lists) == ["--text", "a", "--text", "b", "--seed", "1"]
    repeated = ["--calibration", "a", "--calibration", "b"]
    assert _spread(repeated, lists) == repeated


def test_doctor_says_what_fits(capsys, layerwise_checkpoint):
    assert main(["doctor", "--model", str(layerwise_checkpoint), "--hosts", "2"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "ray", "shared memory", "backbone", "KV cache", "units", "all of it here"):
        assert word in out
    assert main(["doctor", "--model", str(layerwise_checkpoint), "--hosts", "6"]) == 1
    assert "FAIL model" in capsys.readouterr().out


def test_doctor_takes_what_serve_takes_and_refuses_what_it_refuses(capsys, layerwise_checkpoint, tmp_path):
    """An empty file of tokens; a cache larger than any memory, which serve refuses; a cache that is small enough."""
    asked = ["doctor", "--model", str(layerwise_checkpoint), "--hosts", "2", "--kv-cache-memory"]
    tokens = tmp_path / "tokens"
    tokens.touch()
    assert main([*asked, "4MB", "--step-tokens", "64", "--grpc-port", "0", "--host-memory", "1 MiB"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"KV cache +(4\.00|3\.9\d) MB", out)
    assert main([*asked, "10000GB", "--token-file", str(tokens)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"FAIL model +--kv-cache-memory 10TB: allowed: at most [\d.]+[MG]B, the memory that is free", out)
    assert "FAIL door's files" in out and "--token-file" in out
    assert main([*asked, "lots"]) == 2
    error = capsys.readouterr().err
    assert error == "pregate: --kv-cache-memory lots: allowed: a number, above 0, also as 16GB, 500MB or 16GiB\n"
    assert main([*asked, "1e9", "--step-tokens", "10000"]) == 2
    assert "--step-tokens 10000: allowed: at most 8192 (--max-rows)" in capsys.readouterr().err


def test_doctor_cuts_no_path_and_gives_no_remedy_that_does_not_fit(capsys, layerwise_checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / ("a-long-[name]" * 8)
    shutil.copytree(layerwise_checkpoint, folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--model", str(folder)]) == 1
    out = capsys.readouterr().out
    assert str(folder / "tokenizer.json") in out
    assert "pregate convert" not in out  # the model was converted; its tokenizer is damaged
    assert "warn Ray's token" in out
    assert "-> set HOME to a folder of yours, or RAY_AUTH_TOKEN_PATH to a file" in out


def test_bench_kernels_prints_a_line_per_batch_size(capsys):
    assert main(["bench", "kernels", "--shape", "quartet", "--tokens", "1,8", "--expert-ffn", "loop"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "quartet, 25 % active, loop on cpu in float32, ms"
    assert [line.split()[0] for line in lines] == ["1", "8"]
    assert all(float(value) > 0 for line in lines for value in line.split()[1:])


def test_help_of_convert_says_what_a_recipe_is(capsys):
    assert main(["convert", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recipe capture: clustering capture, shared-by capture" in shown
    assert all(f"Recipe {name}:" in shown for name in RECIPES)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["config"], ["config", "--help"]])
def test_a_full_disk_is_one_line(layerwise_checkpoint, arguments):
    """Also where what is printed is less than Python writes at once."""
    code = "import sys; from pregate.cli.main import main; sys.exit(main(sys.argv[1:]))"
    given = [*arguments, "--model", str(layerwise_checkpoint)]
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code, *given], check=False, timeout=120, text=True, **pipes)
    assert (done.returncode, done.stderr) == (1, "pregate: the output cannot be written: No space left on device\n")


def test_a_file_that_may_not_be_read_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/models/weights")

    monkeypatch.setattr("pregate.cli.flags.of_keys", refuse)
    assert main(["config", "--model", "/models"]) == 1
    assert capsys.readouterr().err == "pregate: /models/weights: Permission denied\n"

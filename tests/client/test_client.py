"""The client alone: it is light, it is careful with tokens, and it turns statuses into typed errors."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pregate import Client
from pregate.base.errors import UnavailableError, UserError

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = ("torch", "ray", "transformers", "numpy", "tokenizers", "zmq", "fastapi", "pregate.router", "pregate.model")
SCRIPT = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {BLOCKED}):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
from pregate.client.client import Client
client = Client("127.0.0.1:1", timeout_s=1)
try:
    client.health()
except Exception as error:
    assert type(error).__name__ == "UnavailableError", error
else:
    raise AssertionError("nothing listens there")
assert not set({BLOCKED}) & set(sys.modules)
print("light")
"""


def test_it_works_without_the_heavy_packages():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "light\n"


def test_nothing_at_the_target_is_unavailable_soon():
    start_s = time.monotonic()
    with Client("127.0.0.1:1", timeout_s=20, retry_s=0) as client:
        with pytest.raises(UnavailableError):
            client.model_info()
        with pytest.raises(UnavailableError):
            list(client.generate("x"))
    assert time.monotonic() - start_s < 15


@pytest.mark.parametrize("what", ["generate", "route"])
def test_a_server_that_goes_away_while_it_refuses_ends_the_call(what):
    """In a process of its own, which is ended should it wait for ever."""
    command = [sys.executable, str(Path(__file__).with_name("leaving_server.py")), what]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=60, check=True)  # fmt: skip
    kind, seconds = done.stdout.split()
    assert kind == "UnavailableError"
    assert float(seconds) < 10, "before its deadline"


@pytest.mark.parametrize("target", ["10.0.0.1:1", "example.org:50051", "localhost.example.org:1", "127.example.org:1"])
def test_a_token_does_not_travel_in_clear_text(target):
    with pytest.raises(UserError, match="would travel in clear text"):
        Client(target, token="secret")


@pytest.mark.parametrize("target", ["localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/tmp/x"])
def test_on_loopback_a_token_may(target):
    Client(target, token="secret").close()


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(UserError, match="timeout_s 0: must be above 0"):
        Client("127.0.0.1:1", timeout_s=0)
    with pytest.raises(UserError, match=r"ca .*none\.pem: cannot be read"):
        Client("127.0.0.1:1", ca=tmp_path / "none.pem")
    with Client("127.0.0.1:1") as client:
        for prompt, options in [([-1], {}), ([1 << 40], {}), ("x", {"max_tokens": 1 << 70}), ("\ud800", {})]:
            with pytest.raises(UserError):
                client.generate(prompt, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": "a"}, "temperature 'a': must be a number"),
        ({"top_k": 1.5}, "top_k 1.5: must be a whole number, -9223372036854775808 to"),
        ({"seed": 1 << 63}, "seed 9223372036854775808: must be a whole number, .* to 9223372036854775807"),
        ({"stop": 5}, "stop 5: must be a list, each text"),
        ({"stop": ["\ud800"]}, "stop .*ud800.*: must be a list, each text without lone surrogates"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids .1.5.: must be a list, each a whole number, 0 to 4294967295"),
        ({"logit_bias": {"a": 1}}, "logit_bias .*: must be a mapping of a whole number, 0 to 4294967295 to a number"),
        ({"ignore_eos": "a"}, "ignore_eos 'a': must be True or False"),
        ({"request_id": 5}, "request_id 5: must be text"),
        ({"priority": 1 << 64}, "priority 18446744073709551616: must be a whole number"),
        ({"timeout_s": float("inf")}, "timeout_s inf: must be a number of seconds, at most 31536000"),
        ({"timeout_s": float("nan")}, "timeout_s nan: must be a number of seconds"),
        ({"timeout_s": "a"}, "timeout_s a: must be a number of seconds"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_its_name(options, sentence):
    with Client("127.0.0.1:1") as client, pytest.raises(UserError, match=f"^{sentence}"):
        client.generate("x", **options)


@pytest.mark.parametrize("messages", [None, "x", {"role": "user"}, [None], [{"role": 5}], [{"rule": "user"}]])
def test_a_chat_is_a_list_of_messages(messages):
    with Client("127.0.0.1:1") as client, pytest.raises(UserError, match=r"^(messages|role|rule) .*: (must|unknown)"):
        client.chat(messages)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": "127.0.0.1:99999"}, "target 127.0.0.1:99999: its port must be 1 to 65535"),  # gRPC would ask 34463
        ({"target": ""}, "target '': must be HOST:PORT"),
        ({"target": [5]}, "target .5.: must be HOST:PORT"),
        ({"target": None}, "target None: must be HOST:PORT"),
        ({"timeout_s": float("inf")}, "timeout_s inf: must be a number of seconds"),
        ({"timeout_s": None}, "timeout_s None: must be a number of seconds"),
        ({"retry_s": float("nan")}, "retry_s nan: must be 0"),
        ({"token": 5}, "token: must be text of printable ASCII"),
        ({"token": "schlüssel"}, "token: must be text of printable ASCII"),
    ],
)
def test_a_connection_that_cannot_be_is_refused_by_its_arguments_name(arguments, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        Client(**{"target": "127.0.0.1:1", **arguments})

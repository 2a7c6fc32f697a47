"""`pregate chat` against a server, through a pipe and on a terminal."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.router.running import served, slow_steps, wait_for

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}assistant:"
GREEDY = ("--temperature", "0")


@pytest.fixture(scope="module")
def server(tiny_path_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_path_checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with served(folder) as (engine, front):
        slow_steps(engine, 0.03)  # an answer of 200 tokens still runs when it is stopped
        yield engine, front


def chat(front, *arguments):
    return [sys.executable, "-m", "pregate.cli.main", "chat", "--target", front.target, *map(str, arguments)]


def talk(command, text):
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_piped_lines_are_messages_of_one_conversation(server):
    _, front = server
    command = chat(front, *GREEDY, "--max-tokens", 12, "--system", "Be brief.")
    done = talk(command, "one\n\ntwo\n/new\none\n")
    assert done.returncode == 0, done.stderr
    answers, messages = [], [{"role": "system", "content": "Be brief."}]
    for text in ("one", "two"):
        messages.append({"role": "user", "content": text})
        call = front.client.chat(messages, 12)
        answers.append("".join(chunk.text for chunk in call))
        if call.completion.finish_reason == "length":
            answers[-1] += " (cut at 12 tokens)"
        messages.append({"role": "assistant", "content": call.completion.text})
    assert done.stdout == "".join(f"{answer}\n" for answer in (*answers, answers[0]))


def test_an_error_through_a_pipe_is_one_line_and_the_exit_code(server):
    _, front = server
    command = chat(front, "--max-tokens", 2)
    done = talk(command, "word " * 4000)
    assert done.returncode == 2
    assert done.stderr.startswith("pregate: prompt of ")


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(server):
    engine, front = server
    controller, terminal = pty.openpty()
    command = chat(front, *GREEDY, "--max-tokens", 200)
    name = os.ttyname(terminal)  # of a session's leader that opens it, the terminal
    shell = ["sh", "-c", f"exec {shlex.join(command)} <{name} >{name} 2>&1"]
    process = subprocess.Popen(shell, cwd=ROOT, start_new_session=True)
    seen = ""

    def until(pattern, press_again=b""):
        nonlocal seen
        give_up_s = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert time.monotonic() < give_up_s, seen
            if select.select([controller], [], [], 5)[0]:
                seen += os.read(controller, 4096).decode(errors="replace")
            else:
                os.write(controller, press_again)
        seen = seen[re.search(pattern, seen).end() :]

    until("> ")
    os.write(controller, b"tell me\n")
    wait_for(lambda: engine.info()["num_running"] == 1, what="the request")
    os.write(controller, b"\x03")
    until(r"\(stopped\)\s+> ")
    wait_for(lambda: not engine.has_work, what="an idle engine")
    os.write(controller, b"half a line\x03")
    until("> ", press_again=b"\x03")  # of 40 runs `input` overlooked a signal once, that came before it slept
    os.write(controller, b"\x04")
    assert process.wait(30) == 0
    os.close(terminal)
    os.close(controller)

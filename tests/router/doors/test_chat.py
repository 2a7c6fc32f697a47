"""Chat messages become the prompt that transformers makes of them, and are refused in a sentence where they cannot."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.router.doors.chat import Chat, ChatTemplate
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.running import door, engine_thread, local_engine, socket_folder

ROOT = Path(__file__).resolve().parents[3]
TALK = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "O wind?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "§ ☃ 🙂"},
]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
#: Of each kind of thing that templates in use do.
TEMPLATES = {
    "chatml": CHATML,
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}{% else %}{% set loop_messages = messages %}"
        "{% set system = '' %}{% endif %}{% for m in loop_messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}"
        "{{ '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' if m['role'] == 'user' else"
        " ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
    ),
    "functions": (
        "{%- set ns = namespace(n=0) %}\n{%- for m in messages %}\n"
        "    {%- if m.role == 'nobody' %}{% continue %}{% endif %}\n"
        "    {%- set ns.n = ns.n + 1 %}\n    {{- m | tojson }}\n{% generation %}{{ m.content }}{% endgeneration %}\n"
        "{%- endfor %}\n{{ ns.n }} {{ strftime_now('%Y') }} {{ tools is none }} {{ style | default('plain') }}"
    ),
}


@pytest.fixture
def folder(tiny_dense, tmp_path):
    """Makes a folder with the tiny model's tokenizer and this template."""

    def make(template=None, **settings):
        for file in tiny_dense.glob("tokenizer*"):
            shutil.copy(file, tmp_path)
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path

    return make


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("talk", [TALK, TALK[1:]])
def test_the_prompt_is_the_one_transformers_makes(folder, name, opens, talk):
    path = folder(TEMPLATES[name])
    expected = AutoTokenizer.from_pretrained(path).apply_chat_template(
        talk, tokenize=False, add_generation_prompt=opens, style="grand"
    )
    assert ChatTemplate(path).render(Chat(talk, opens, {"style": "grand"})) == expected


def test_a_template_may_lie_in_the_tokenizer_s_settings(folder):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert ChatTemplate(folder(chat_template="plain")).render(Chat(TALK[1:])) == "plain"
    assert ChatTemplate(folder(chat_template=named)).render(Chat(TALK[1:])) == "yes"


def test_parts_are_lines_and_what_is_none_is_left_out(folder):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts, "name": None},
        {"role": "assistant", "content": None, "refusal": None},
    ]
    rendered = ChatTemplate(folder("{% for m in messages %}{{ m | tojson }}{% endfor %}")).render(Chat(messages))
    assert rendered == '{"role": "user", "content": "a\\nb"}{"role": "assistant"}'


def test_developer_is_system_where_the_template_knows_no_better(folder):
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    assert ChatTemplate(folder(CHATML)).render(Chat(messages)).startswith("<|system|>")
    known = CHATML + "{# developer #}"
    assert ChatTemplate(folder(known)).render(Chat(messages)).startswith("<|developer|>")


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        (None, TALK, "messages: the model has no chat template; send a prompt instead"),
        ("{% if %}", TALK, "messages: the model's chat template cannot be read: Expected an expression"),
        (CHATML, [], "messages of length 0: at least one is needed"),
        (CHATML, [{"content": "x"}], "messages.0.role null: must be a role's name"),
        (CHATML, [{"role": "user", "content": 3}], "messages.0.content of int: must be text or a list of text parts"),
        (
            CHATML,
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages.0.content.0 of type image_url: allowed:",
        ),
        (TEMPLATES["llama"], TALK[2:], "messages: the model's chat template does not take them: roles must alternate"),
        ("{{ messages[0].__class__.__mro__ }}", TALK[1:], "messages: the model's chat template does not take them"),
        ("{{ messages.append(1) }}", TALK[1:], "messages: the model's chat template does not take them"),
        ("{{ messages[0].content + 1 }}", TALK[1:], "messages: the model's chat template does not take them"),
        ("{{ messages[-1].content }}", TALK, "messages: the model's chat template has no system role"),
    ],
)
def test_what_cannot_be_rendered_is_refused_in_a_sentence(folder, template, messages, sentence):
    with pytest.raises(UserError) as caught:
        ChatTemplate(folder(template)).render(Chat(messages))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def engine(tiny_path_checkpoint):
    with local_engine(tiny_path_checkpoint) as engine:
        yield engine


def test_a_bos_of_the_template_is_not_doubled(engine, folder):
    """The tokenizer adds one to a text of its own accord; a template's ids are those transformers gives."""
    path = folder(TEMPLATES["llama"])
    ids = AutoTokenizer.from_pretrained(path).apply_chat_template(TALK, return_dict=False)
    assert ids[:2] != [1, 1] and ids[0] == 1
    with socket_folder() as sockets:
        endpoint = f"ipc://{sockets}/engine.sock"
        with engine_thread(engine, endpoint), door(endpoint, path, engine_first=True) as front:
            route = front.loop.call(front.service.route(Chat(TALK)))
            assert list(route.token_ids) == ids
            plain = front.loop.call(front.service.route("O wind"))
            assert plain.token_ids[0] == 1


def test_a_door_refuses_a_chat_without_template(engine, tiny_path_checkpoint):
    with socket_folder() as sockets, engine_thread(engine, f"ipc://{sockets}/engine.sock"):

        async def ask():
            service = DoorService(EngineClient(f"ipc://{sockets}/engine.sock"), tiny_path_checkpoint, "tiny")
            try:
                await service.route(Chat(TALK))
            finally:
                await service.close()

        with pytest.raises(UserError, match="the model has no chat template"):
            asyncio.run(ask())


def test_doors_load_no_torch():
    code = "import sys, pregate.router.doors.chat, pregate.router.doors.service; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)

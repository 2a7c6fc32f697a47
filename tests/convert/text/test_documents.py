from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pregate.base.errors import UserError
from pregate.convert.text.documents import (
    Document,
    cut_paragraphs,
    cut_sentences,
    draw_documents,
    read_documents,
    text_files,
)


def test_books_are_cut_at_paragraphs(tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text("aaaa\n\nbbbb\n \n\ncccc\r\n\r\ndddddddddddd\n")
    assert [d.text for d in read_documents([book], 4, "--text")] == ["aaaa\n\nbbbb\n\ncccc", "dddddddddddd"]
    assert cut_paragraphs("a\n\nb", 1) == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"id": "a7", "text": "one"}, "one"),
        ({"question": "2?", "answer": "2"}, "Question: 2?\nAnswer: 2"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "3"}]}, "User: Hi\n\nTool: 3"),
        (
            {"id": "7", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
            "User: Hi\n\nAssistant: Yes?",
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Instruction: Add.\nInput: 1 2\nOutput: 3",
        ),
        ({"instruction": "Say hi.", "input": "", "output": "hi"}, "Instruction: Say hi.\nOutput: hi"),
        ({"prompt": "Once", "completion": " upon"}, "Once upon"),
    ],
)
def test_records_of_every_form(tmp_path: Path, record: dict[str, Any], text: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n\n" + json.dumps({"text": " "}))
    assert [d.text for d in read_documents([path], 512, "--text")] == [text]


def test_the_field_of_the_text_can_be_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"text": "no", "story": "yes", "turns": turns, "id": 7}))
    assert [d.text for d in read_documents([path], 512, "--text", "story")] == ["yes"]
    assert [d.text for d in read_documents([path], 512, "--text", "turns")] == ["User: Hi"]
    with pytest.raises(UserError, match=r"^text \S+rows\.jsonl:1: field 'id' is no string .*'story'"):
        read_documents([path], 512, "--text", "id")


def test_a_record_whose_only_strings_are_ids_is_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"id": "u7", "url": "x"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: a record needs \"text\".*it has 'id', 'url'; text_field"):
        read_documents([path], 512, "--text")


def test_half_of_a_surrogate_pair_is_refused_where_it_stands(tmp_path: Path):
    """As a pair that somebody cut in two leaves it; a tokenizer's own error was a traceback."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "once \\ud83d upon"}\n{"text": "\\ud83d\\ude42"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: half of a surrogate pair \('\\ud83d'\) at character 5"):
        read_documents([path], 512, "--text")


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("two", encoding="utf-8-sig")
    assert [d.text for d in read_documents([tmp_path], 512, "--text")] == ["one", "two"]


def test_text_without_blank_lines_is_used_whole(tmp_path: Path):
    path = tmp_path / "book.txt"
    text = " ".join(f"This is sentence {i}." for i in range(400))
    path.write_text(text)
    pieces = [d.text for d in read_documents([path], 64, "--text")]
    assert " ".join(pieces) == text
    assert all(len(piece) <= 64 * 3.5 and piece.endswith(".") for piece in pieces)
    assert [d.text for d in read_documents([path], 64, "--text", whole_paragraphs=True)] == [text]


def test_long_paragraphs_are_cut_and_others_are_not():
    assert cut_sentences("One. Two words.", 9) == ["One. Two", "words."]
    assert cut_sentences("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]
    assert cut_sentences("你好。" * 6, 20) == ["你好。你好。"] * 3  # three bytes each
    assert cut_paragraphs("a " * 30 + "\n\nb", 10) == ["a " * 29 + "a", "b"]
    assert cut_paragraphs("a " * 130 + "\n\nbb", 10) == ["a a a a a"] * 26 + ["bb"]


def test_folders_are_walked_and_files_come_once(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.txt", "a/b/y.jsonl", "a/z.csv"):
        (tmp_path / name).write_text("{}")
    files = text_files([tmp_path, tmp_path / "a" / "x.txt"], "--text")
    assert files == [tmp_path / "a" / "b" / "y.jsonl", tmp_path / "a" / "x.txt"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", "  \n\n", "holds no text"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "broken.jsonl:2: not a JSON record"),
        ("numbers.jsonl", '{"id": 1}', "numbers.jsonl:1: a record needs"),
        ("table.csv", "a,b", "allowed: .txt and .jsonl"),
        ("latin.txt", b"caf\xe9", "not readable as UTF-8"),
    ],
)
def test_bad_text_is_refused_by_option_and_file(tmp_path: Path, name: str, content: str | bytes, reason: str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"^calibration .*" + name) as caught:
        read_documents([path], 512, "--calibration")
    assert reason in str(caught.value)


def test_patterns_are_matched(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl", "c.txt", "d/e.jsonl", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert text_files([tmp_path / "*.jsonl"], "--text") == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert text_files([tmp_path / "**" / "e.jsonl"], "--text") == [tmp_path / "d" / "e.jsonl"]
    assert text_files([tmp_path / "odd[1].txt"], "--text") == [tmp_path / "odd[1].txt"]
    with pytest.raises(UserError, match=r"^text .*\*\.csv: no file matches"):
        text_files([tmp_path / "c.txt", tmp_path / "*.csv"], "--text")


def test_missing_path_and_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"^text .*nowhere: no such path"):
        read_documents([tmp_path / "nowhere"], 512, "--text")
    with pytest.raises(UserError, match=r"holds no .txt or .jsonl file"):
        read_documents([tmp_path], 512, "--text")


def test_draw_interleaves_folders_and_keeps_every_document():
    many = [Document(f"m{i}", Path("many/f.txt")) for i in range(6)]
    few = [Document(f"f{i}", Path("few/f.txt")) for i in range(2)]
    drawn = draw_documents(many + few, seed=3)
    assert [d.text[0] for d in drawn] == ["m", "f", "m", "f", "m", "m", "m", "m"]
    assert sorted(d.text for d in drawn) == sorted(d.text for d in many + few)
    assert drawn == draw_documents(many + few, seed=3)
    assert drawn != draw_documents(many + few, seed=4)

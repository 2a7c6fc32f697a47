from __future__ import annotations

import json
from pathlib import Path

import pytest

from pregate.base.errors import UserError
from pregate.convert.text.documents import Document, cut_paragraphs, draw_documents, read_documents, text_files


def test_books_are_cut_at_paragraphs(tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text("aaaa\n\nbbbb\n \n\ncccc\r\n\r\ndddddddddddd\n")
    assert [d.text for d in read_documents([book], 4, "--text")] == ["aaaa\n\nbbbb\n\ncccc", "dddddddddddd"]
    assert cut_paragraphs("a\n\nb", 1) == ["a", "b"]


def test_records_of_every_kind(tmp_path: Path):
    records = [{"text": "one"}, {"question": "2?", "answer": "2"}, {"id": 7, "story": "three"}, {"text": "  "}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
    texts = [d.text for d in read_documents([path], 512, "--text")]
    assert texts == ["one", "Question: 2?\nAnswer: 2", "three"]


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
    with pytest.raises(UserError, match=r"^--calibration .*" + name) as caught:
        read_documents([path], 512, "--calibration")
    assert reason in str(caught.value)


def test_missing_path_and_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"^--text .*nowhere: no such path"):
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

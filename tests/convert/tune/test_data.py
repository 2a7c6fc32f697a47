from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.tune.data import BatchOrder, read_rows, windows_of


def test_windows_by_hand():
    assert windows_of([1, 2, 3, 4, 5], 3) == [[1, 2, 3], [3, 4, 5]]
    assert windows_of([1, 2, 3, 4], 3) == [[1, 2, 3], [3, 4]]
    assert windows_of([1, 2], 3) == [[1, 2]]


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_every_id_but_the_first_is_predicted_once(length: int):
    ids = list(range(33))
    windows = windows_of(ids, length)
    assert [i for w in windows for i in w[1:]] == ids[1:]
    assert all(2 <= len(w) <= length for w in windows)


def write_documents(path: Path, num: int) -> Path:
    path.write_text("\n".join(json.dumps({"text": f"harbour {n} " * (n % 7 + 1)}) for n in range(num)))
    return path


def test_validation_documents_are_used_for_nothing_else(tiny_dense: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    path = write_documents(tmp_path / "a.jsonl", 40)
    rows = read_rows([path], tokenizer, 512, 0.1, seed=3)
    assert len(rows.held_back) == 4
    assert len(rows.training) == 36
    assert not {tuple(r) for r in rows.held_back} & {tuple(r) for r in rows.training}
    assert rows == read_rows([path], tokenizer, 512, 0.1, seed=3)
    other = read_rows([path], tokenizer, 512, 0.1, seed=4)
    assert rows.digest() != other.digest()
    assert rows.describe()["num_rows"] == 36


def test_a_long_document_is_used_whole(tiny_dense: Path, tmp_path: Path):
    path = write_documents(tmp_path / "a.jsonl", 40)
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    whole, cut = (read_rows([path], tokenizer, n, 0.1, seed=0) for n in (512, 8))
    assert sum(len(r) - 1 for r in whole.training) == sum(len(r) - 1 for r in cut.training)
    assert max(map(len, cut.training)) == 8 == max(map(len, cut.held_back))


def test_text_of_one_document_is_refused(tiny_dense: Path, tmp_path: Path):
    path = write_documents(tmp_path / "a.jsonl", 1)
    with pytest.raises(UserError, match=r"text .*a\.jsonl: needs two documents"):
        read_rows([path], AutoTokenizer.from_pretrained(tiny_dense), 512, 0.5, seed=0)


def test_every_row_comes_once_each_time_round_and_the_order_follows_from_the_seed():
    rows = [[n] * (2 + n % 5) for n in range(60)]
    order = BatchOrder(rows, 20, seed=1)
    num = order.num_batches
    rounds = [[order.batch(i) for i in range(r * num, (r + 1) * num)] for r in range(2)]
    for batches in rounds:
        assert sorted(row for batch in batches for row in batch) == sorted(rows)
        assert all(len(batch) * max(map(len, batch)) <= 20 for batch in batches)
    assert rounds[0] != rounds[1]
    again = BatchOrder(rows, 20, seed=1)
    assert again.batch(num + 3) == rounds[1][3]  # no need to have given those before
    assert [BatchOrder(rows, 20, seed=2).batch(i) for i in range(num)] != rounds[0]


def test_validation_text_of_its_own_leaves_all_documents_to_tune_on(tiny_dense: Path, tmp_path: Path):
    path, other, empty = (tmp_path / f"{name}.jsonl" for name in ("text", "other", "empty"))
    path.write_text("".join(json.dumps({"text": f"the boats of day {n}"}) + "\n" for n in range(9)))
    other.write_text(json.dumps({"text": "a bell beneath the grey waves"}) + "\n")
    empty.write_text(json.dumps({"text": " "}) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    rows = read_rows([path], tokenizer, 64, 0.5, seed=0, validation=[other])
    assert (len(rows.training), len(rows.held_back)) == (9, 1)
    assert tokenizer.decode(rows.held_back[0], skip_special_tokens=True) == "a bell beneath the grey waves"
    with pytest.raises(UserError, match=r"validation .*empty"):
        read_rows([path], tokenizer, 64, 0.5, seed=0, validation=[empty])

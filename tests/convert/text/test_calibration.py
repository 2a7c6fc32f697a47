from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pregate.base.errors import UserError
from pregate.convert.text.calibration import encode, encode_pool, pack_windows, read_calibration, stream_windows
from pregate.convert.text.documents import Document
from tests.convert.interruption import StopsAfter


def test_windows_start_at_document_starts():
    rows = [[1, 5, 6], [1, 7], [1, 8, 9], [1, 2, 3, 4, 5], [1, 6]]
    assert pack_windows(iter(rows), 4, 10) == [[1, 5, 6, 1], [1, 8, 9, 1]]
    assert pack_windows(iter(rows), 4, 1) == [[1, 5, 6, 1]]
    assert pack_windows(iter([[1, 5]]), 4, 3) == [[1, 5]]  # text shorter than a window is one short window


def test_bos_comes_first_and_once(tiny_dense: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    ids = encode(tokenizer, "The harbour", 100)
    assert ids == tokenizer("The harbour")["input_ids"]
    assert ids[0] == 1
    assert 1 not in ids[1:]
    assert encode(tokenizer, "The harbour", 2) == ids[:2]


def test_calibration_windows_are_reproducible_and_disjoint_from_the_held_back(tiny_dense: Path, tiny_text: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    first, again, other = (read_calibration([tiny_text], tokenizer, 8, 32, seed) for seed in (0, 0, 1))
    assert first.windows.tolist() == again.windows.tolist() != other.windows.tolist()
    assert first.windows.shape == (8, 32)
    assert (first.windows[:, 0] == 1).all()
    assert len(first.held_back) == 1
    assert first.files == (tiny_text,)


def test_text_without_tokens_is_refused(tiny_dense: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"^calibration"):
        read_calibration([path], AutoTokenizer.from_pretrained(tiny_dense), 8, 32, 0)


def test_too_little_text_is_refused_with_what_is_enough(tiny_dense: Path, tiny_text: Path, tmp_path: Path):
    tokenizer, notes = AutoTokenizer.from_pretrained(tiny_dense), StopsAfter(-1)
    (tmp_path / "word.txt").write_text("harbour")
    for draw in ("documents", "stream"):
        with pytest.raises(
            UserError, match=r"word\.txt: its text gives no window of 32 tokens; 4 .*288 tokens are enou"
        ):
            read_calibration([tmp_path / "word.txt"], tokenizer, 8, 32, 0, draw)
    read_calibration([tiny_text], tokenizer, 8, 32, 0, progress=notes)
    assert notes.notes == []
    read_calibration([tiny_text], tokenizer, 80, 32, 0, progress=notes)
    assert re.search(r"--calibration \S+harbour\.txt: its text gives \d+ windows .* about 2,880", notes.notes[0])


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples_leave_text_to_measure_on(tiny_dense: Path, tiny_text: Path, samples: int):
    """Of two or three windows none was held back: perplexities were None."""
    text = read_calibration([tiny_text], AutoTokenizer.from_pretrained(tiny_dense), samples, 32, 0)
    assert (len(text.training), len(text.held_back)) == (samples, 1)


def test_where_windows_lie_all_over_the_text_that_is_said(tiny_dense: Path, tiny_text: Path):
    notes = StopsAfter(-1)
    text = read_calibration(
        [tiny_text], AutoTokenizer.from_pretrained(tiny_dense), 200, 256, 0, "stream", progress=notes
    )
    assert not text.held_back and "none is left beside them to measure perplexity on" in notes.notes[-1]


def test_pool_keeps_to_its_token_budget(tiny_dense: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dense)
    documents = [Document("The harbour lay quiet before the storm.", Path("a.txt"))] * 5
    rows = list(encode_pool([d.text for d in documents], tokenizer, length=6, total_tokens=15))
    assert [len(r) for r in rows] == [6, 6, 3]


def test_windows_of_a_stream_lie_anywhere_and_held_back_ones_elsewhere():
    ids = list(range(1000))
    kept, held_back = stream_windows(ids, 50, 4, 3, seed=0)
    rng = random.Random(0)  # as the released code draws: randint(0, len - length - 1)
    assert [window[0] for window in kept] == [rng.randint(0, 949) for _ in range(4)]
    assert all(window == list(range(window[0], window[0] + 50)) for window in kept + held_back)
    assert len(held_back) == 3
    assert not {i for window in kept for i in window} & {i for window in held_back for i in window}
    assert stream_windows(ids[:40], 50, 4, 3, seed=0) == ([ids[:40]], [])

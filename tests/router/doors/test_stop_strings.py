"""Stop strings: against brute force on every text, however tokens and events cut it."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pregate.base.completion import TokenLogprob
from pregate.cli.main import main
from pregate.model.checkpoint import read_manifest, write_manifest
from pregate.router.doors.completion_text import CompletionText
from pregate.router.doors.stop_strings import StopStrings
from pregate.router.doors.token_texts import TokenTexts
from pregate.router.link.messages import FinishedEvent, SamplingParams, SubmitRequest, TokensEvent
from tests.router.doors.test_detokenize import byte_fallback, byte_level
from tests.router.running import served


def brute_force(text: str, stop: list[str], exempt: int = 0) -> tuple[str, bool]:
    """Character by character: the first after `exempt` that completes a stop string ends the text where that begins."""
    for end in range(exempt + 1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.text("ab🙂", max_size=5), max_size=12),
    st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3),
    st.integers(0, 4),
)
def test_whatever_the_pieces_the_end_is_brute_force_s(pieces: list[str], stop: list[str], num_exempt: int):
    finder, shown, ended = StopStrings(stop), "", False
    expected, hit = brute_force("".join(pieces), stop, len("".join(pieces[:num_exempt])))
    for number, piece in enumerate(pieces):
        text, ended = finder.push(piece, ends=number >= num_exempt)
        shown += text
        assert expected.startswith(shown), "nothing is shown and then taken back"
        if ended:
            break
    assert (shown + finder.flush(), ended) == (expected, hit)


def test_nothing_that_cannot_begin_a_stop_string_is_held_back():
    finder = StopStrings(["\n\nUser:", "END"])
    assert finder.push("so it goes") == ("so it goes", False)
    assert finder.push("\n") == ("", False)
    assert finder.push("on E") == ("\non ", False)
    assert finder.push("ND and more") == ("", True)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request):
    return request.param()


def run(tokenizer, ids, stop, cuts, min_tokens=0):
    """The completion of `ids` that come in events of so many, and its chunks."""
    request = SubmitRequest("r", tuple(tokenizer.encode("once").ids), SamplingParams(99, min_tokens=min_tokens))
    text, chunks, start = CompletionText(TokenTexts(tokenizer), request, stop, 0), [], 0
    while start < len(ids) and not text.stopped:
        some = tuple(ids[start : start + next(cuts)])
        chunks.append(text.push(TokensEvent("r", some, tuple(TokenLogprob(i, -1.0) for i in some))))
        start += len(some)
    end = None
    if not text.stopped:
        chunks.append(text.flush())
        end = FinishedEvent("r", "length", 1, len(ids), (3,))
    return text.completion("r", end), [c for c in chunks if c is not None]


def cuts(most):
    rng = random.Random(most)
    while True:
        yield rng.randrange(1, most + 1)


@pytest.mark.parametrize("seed", range(60))
def test_stop_strings_straddle_tokens_and_characters(tokenizer, seed):
    rng = random.Random(seed)
    if seed % 2:
        ids = tokenizer.encode(rng.choice(["naïve café, 日本語 🙂🙂 ok", "so it goes, and goes, né é"])).ids
    else:  # whatever a model may sample, halves of characters among it
        ids = [rng.randrange(3, tokenizer.get_vocab_size()) for _ in range(30)]
    whole, _ = run(tokenizer, ids, (), cuts(1))
    places = [rng.randrange(len(whole.text)) for _ in range(2)] if whole.text else []
    stop = [whole.text[p : p + rng.randrange(1, 5)] for p in places] or ["x"]
    expected, hit = brute_force(whole.text, stop)
    (one, chunks), (other, _) = run(tokenizer, ids, stop, cuts(1)), run(tokenizer, ids, stop, cuts(7))
    assert one == other, "how many tokens an event brings changes nothing"
    assert (one.text, one.finish_reason) == (expected, "stop" if hit else "length")
    assert one.token_ids == tuple(ids[: len(one.token_ids)])
    assert [t.token_id for t in one.logprobs] == list(one.token_ids)
    assert "".join(c.text for c in chunks) == one.text
    assert sum((c.token_ids for c in chunks), ()) == one.token_ids


def test_up_to_min_tokens_nothing_ends_a_text(tokenizer):
    ids = tokenizer.encode("so it goes, and goes, and goes").ids
    whole = run(tokenizer, ids, (), cuts(1))[0].text
    for min_tokens in range(len(ids) + 1):
        done, _ = run(tokenizer, ids, ["goes"], cuts(3), min_tokens)
        assert done.completion_tokens >= min(min_tokens, len(ids))
        assert whole.startswith(done.text)
        assert done.text == whole or whole[len(done.text) :].startswith("goes")


def test_a_model_s_own_are_obeyed_by_generate_and_server_alike(path_checkpoint, tmp_path, capsys):
    """As its repetition penalty is; once `generate` obeyed them, and a server did not."""
    folder, prompt = shutil.copytree(path_checkpoint, tmp_path / "particular"), "the harbour lay"

    def generated(**settings) -> dict:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
        write_manifest(folder, read_manifest(folder))
        assert main(["generate", "--model", str(folder), "--prompt", prompt, "--max-tokens", "24", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    plain, whole = generated()["text"], generated(repetition_penalty=3.0)["text"]
    assert plain != whole
    stop = whole[len(whole) // 2 :][:2]
    cut = generated(repetition_penalty=3.0, stop_strings=[stop])
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    with served(folder) as (_engine, front):
        completion = front.client.complete(prompt, max_tokens=24)
    assert (completion.text, list(completion.token_ids), completion.finish_reason) == (
        cut["text"], cut["token_ids"], "stop"
    )  # fmt: skip

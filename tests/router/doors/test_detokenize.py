"""Streamed text equals decoding the whole, for any ids, in any pieces, and cuts no character."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pregate.router.doors.detokenize import Detokenizer
from pregate.router.doors.token_texts import TokenTexts

CORPUS = ["once upon a time there was a naïve café", "日本語 のテスト 🙂🙂 ok", "so it goes, and goes, and goes"] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's way: `▁` for spaces, `<0x0A>` tokens for what the vocabulary lacks, the first space stripped."""
    tokens = SPECIAL + [f"<0x{b:02X}>" for b in range(256)] + list("▁abcdefghijklmnopqrstuvwxyz,é") + ["▁o", "▁on"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "o"), ("▁o", "n")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request) -> Tokenizer:
    return request.param()


def stream(tokenizer, prompt, ids, sizes):
    detokenizer, pieces, start = Detokenizer(TokenTexts(tokenizer), prompt), [], 0
    while start < len(ids):
        size = next(sizes)
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


def sizes(rng):
    while True:
        yield rng.randrange(1, 4)


@pytest.mark.parametrize("text", CORPUS[:3])
def test_text_streams_whole_characters_and_keeps_the_leading_space(tokenizer, text):
    prompt = tokenizer.encode("once").ids
    ids = tokenizer.encode("once " + text).ids[len(prompt) :]
    pieces = stream(tokenizer, prompt, ids, iter(lambda: 1, 0))
    assert "".join(pieces) == " " + text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) >= 3, "it streams, it does not wait for the end"


def test_any_ids_in_any_pieces_give_what_decoding_the_whole_gives(tokenizer):
    rng = random.Random(5)
    num_broken = 0
    for trial in range(600):
        limit = tokenizer.get_vocab_size() if trial % 2 else 260
        before = [rng.randrange(limit) for _ in range(rng.randrange(60))]  # of long prompts the tail is looked at
        prompt = before + tokenizer.encode("once upon").ids
        ids = [rng.randrange(limit) for _ in range(rng.randrange(40))]
        pieces = stream(tokenizer, prompt, ids, sizes(rng))
        whole = tokenizer.decode(prompt + ids)
        assert "".join(pieces) == whole[len(tokenizer.decode(prompt)) :]
        num_broken += "\ufffd" in whole
    assert num_broken > 100, "the trial must hold bytes that are no characters"


def test_prompt_that_ends_inside_a_character_is_completed():
    tokenizer = byte_level()
    ids = tokenizer.encode("on ☃ and 𝄞 on").ids
    whole = "on ☃ and 𝄞 on"
    for cut in range(1, len(ids)):
        pieces = stream(tokenizer, ids[:cut], ids[cut:], iter(lambda: 1, 0))
        text = "".join(pieces)
        assert whole.endswith(text)
        assert "\ufffd" not in text
        shown = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert shown + text == whole


def test_unfinished_character_at_the_end_is_not_lost():
    tokenizer = byte_level()
    ids = tokenizer.encode("on 𝄞").ids[:-1]
    pieces = stream(tokenizer, ids[:1], ids[1:], iter(lambda: 1, 0))
    assert pieces[-1] == "\ufffd"
    assert "\ufffd" not in "".join(pieces[:-1])


def test_special_tokens_give_no_text(tokenizer):
    prompt = tokenizer.encode("on").ids
    end = tokenizer.token_to_id("</s>")
    assert stream(tokenizer, prompt, [end], iter(lambda: 1, 0)) == ["", ""]


@pytest.mark.parametrize("kind", ["continuations", "beginnings", "cut characters", "special"])
def test_a_long_text_without_a_character_is_not_decoded_again_and_again(kind):
    """8,000 bytes that continue nothing took 19.5 s of the event loop: each was decoded with all before it."""
    tokenizer = byte_level()
    vocabulary, spelling = tokenizer.get_vocab(), byte_spelling()
    spelled = {
        "continuations": [0xA1] * 2000,
        "beginnings": [0xE2] * 2000,
        "cut characters": list("𝄞".encode()[:3]) * 600 + list("☃".encode()),
        "special": [],
    }[kind]
    ids = [vocabulary[spelling[b]] for b in spelled] or [vocabulary["</s>"]] * 2000
    decoded, texts = [], TokenTexts(tokenizer)
    decode = texts._decode
    texts._decode = lambda token_ids: (decoded.append(len(token_ids)), decode(token_ids))[1]
    detokenizer, prompt = Detokenizer(texts, tokenizer.encode("once").ids), tokenizer.encode("once").ids
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(prompt + ids)[4:]
    assert sum(decoded) < 100 * len(ids)
    if kind != "special":
        assert sum(map(bool, pieces)) > 50, "it streams"


def byte_spelling() -> dict[int, str]:
    """How byte-level tokenizers spell each byte (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}


@pytest.mark.parametrize("alphabet", [b"\xa1\xe2\xf0\x9d\x84\x9e", b"\xa1\xbf\xef\xbd", bytes(range(128, 256))])
def test_long_runs_of_bytes_give_what_decoding_the_whole_gives(alphabet):
    tokenizer, rng = byte_level(), random.Random(3)
    vocabulary, spelling = tokenizer.get_vocab(), byte_spelling()
    ids_of = [vocabulary[spelling[b]] for b in alphabet]
    for _ in range(60):
        ids = [rng.choice(ids_of) if rng.random() < 0.99 else rng.randrange(300) for _ in range(rng.randrange(300))]
        prompt = tokenizer.encode("once").ids
        assert "".join(stream(tokenizer, prompt, ids, sizes(rng))) == tokenizer.decode(prompt + ids)[4:]

"""Every option of sampling against transformers' logits processors on the same logits, or against plain Python."""

import math
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pregate.router.engine import sampling as ours
from pregate.router.engine.sampling import chances, sample, token_logprobs
from pregate.router.engine.sequence import Sequence
from pregate.router.link.messages import SamplingParams

VOCABULARY = 700


def sequence(seed=0, num_prompt=6, num_new=9, ends=(), penalty=1.0, **sampling):
    ids = np.random.default_rng(seed).integers(0, 30, num_prompt + num_new).tolist()  # few, so that they repeat
    params = SamplingParams(64, **sampling)
    return Sequence(
        "r", ids, num_prompt, 64, params, seed, None, np.zeros(1), end_ids=frozenset(ends), repetition_penalty=penalty
    )


def logits(num_rows, seed=0):
    return torch.randn(num_rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


#: transformers' own type says lists; it takes, and says it takes, a dict by tuples.
sequence_bias: Any = SequenceBiasLogitsProcessor


def theirs(processors, sequences, logits_BV):
    ids: list[Any] = [torch.tensor([s.token_ids]) for s in sequences]
    return torch.cat(
        [LogitsProcessorList(p)(i, x[None].clone()) for p, i, x in zip(processors, ids, logits_BV, strict=True)]
    )


def test_bias_penalty_and_least_length_are_transformers_own():
    sequences = [
        sequence(0, penalty=1.3),
        sequence(1, penalty=0.7, logit_bias=((3, 2.5), (699, -100.0))),
        sequence(2, logit_bias=((5, -1.0),)),
        sequence(3, min_tokens=10, ends=(2, 17)),
        sequence(4, min_tokens=9, ends=(2,)),
        sequence(5),
    ]
    processors = [
        [RepetitionPenaltyLogitsProcessor(1.3)],
        [sequence_bias({(3,): 2.5, (699,): -100.0}), RepetitionPenaltyLogitsProcessor(0.7)],
        [sequence_bias({(5,): -1.0})],
        [MinNewTokensLengthLogitsProcessor(6, 10, [2, 17])],
        [MinNewTokensLengthLogitsProcessor(6, 9, [2])],
        [],
    ]
    x_BV = logits(len(sequences))
    before = x_BV.clone()
    assert torch.equal(ours._processed(x_BV, sequences), theirs(processors, sequences, x_BV))
    assert torch.equal(x_BV, before), "the model's own logits are kept for logprobs"


def test_presence_and_frequency_count_what_was_generated():
    sequences = [
        sequence(0, presence_penalty=0.5),
        sequence(1, frequency_penalty=-1.5),
        sequence(2, presence_penalty=2.0, frequency_penalty=0.25),
        sequence(3, presence_penalty=2.0, num_new=0),
    ]
    x_BV = logits(4)
    found = ours._processed(x_BV, sequences)
    for row, one in enumerate(sequences):
        expected = x_BV[row].tolist()
        for token, count in Counter(one.token_ids[one.num_prompt :]).items():
            expected[token] -= one.sampling.presence_penalty + count * one.sampling.frequency_penalty
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-6, atol=1e-6)


WARPERS = [
    (SamplingParams(1, temperature=0.7), []),
    (SamplingParams(1, temperature=1.5, top_k=1), [TopKLogitsWarper(1)]),
    (SamplingParams(1, temperature=0.9, top_k=40), [TopKLogitsWarper(40)]),
    (SamplingParams(1, temperature=0.9, top_k=5000), []),
    (SamplingParams(1, temperature=1.1, top_p=0.8), [TopPLogitsWarper(0.8)]),
    (SamplingParams(1, temperature=2.0, min_p=0.05), [MinPLogitsWarper(0.05)]),
    (SamplingParams(1, temperature=2.0, min_p=1.0), [MinPLogitsWarper(1.0)]),
    (
        SamplingParams(1, temperature=3.0, top_k=50, top_p=0.9, min_p=0.02),
        [TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
    ),
]


def test_what_may_be_drawn_and_how_likely_is_transformers_own():
    """All in one batch, and each as alone."""
    params = [p for p, _ in WARPERS]
    x_BV = logits(len(WARPERS), seed=1)
    found = chances(x_BV, params)
    for row, (p, warpers) in enumerate(WARPERS):
        apply: Any = LogitsProcessorList([TemperatureLogitsWarper(p.temperature), *warpers])
        x_V = apply(torch.zeros(1, 1), x_BV[row : row + 1])
        expected = x_V.softmax(-1)[0]
        share = found[row] / found[row].sum()
        assert ((share > 0) == (expected > 0)).all(), p
        torch.testing.assert_close(share, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(found[row], chances(x_BV[row : row + 1], [p])[0]), "batch mates change nothing"


def test_equal_logits_at_the_edge_of_top_k_are_all_kept():
    x_V = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = chances(x_V, [SamplingParams(1, temperature=1.0, top_k=2)])[0] > 0
    apply: Any = TopKLogitsWarper(2)
    assert torch.equal(kept, apply(torch.zeros(1, 1), x_V)[0].isfinite())


#: Values of every option that changes what is drawn; `test_every_option_has_an_oracle` says where the others are.
MIX: dict[str, list[Any]] = {
    "logit_bias": [(), ((3, 2.5), (5, -100.0)), ((699, 4.0),)],
    "repetition_penalty": [None, 0.7, 1.3],
    "presence_penalty": [0.0, 1.5, -0.5],
    "frequency_penalty": [0.0, 0.3, -1.0],
    "min_tokens": [0, 9, 10],
    "temperature": [0.3, 1.0, 2.5],
    "top_k": [0, 1, 40],
    "top_p": [1.0, 0.9, 0.3],
    "min_p": [0.0, 0.02, 0.5],
}


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in MIX.items()}), st.integers(0, 50))
def test_any_mix_of_options_is_transformers_own(options, seed):
    penalty, ends = options["repetition_penalty"] or 1.0, (2, 17)
    one, x_1V = sequence(seed, penalty=penalty, ends=ends, **options), logits(1, seed)
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(penalty)]
    if options["logit_bias"]:
        processors.insert(0, sequence_bias({(i,): value for i, value in options["logit_bias"]}))
    expected_1V = theirs([processors], [one], x_1V)
    for token, count in Counter(one.token_ids[one.num_prompt :]).items():
        expected_1V[0, token] -= options["presence_penalty"] + count * options["frequency_penalty"]
    if options["min_tokens"]:
        least = MinNewTokensLengthLogitsProcessor(one.num_prompt, options["min_tokens"], list(ends))
        expected_1V = theirs([[least]], [one], expected_1V)
    found_1V = ours._processed(x_1V, [one])
    torch.testing.assert_close(found_1V, expected_1V, rtol=1e-6, atol=1e-5)
    warpers: list[Any] = [TemperatureLogitsWarper(options["temperature"])]
    warpers += [TopKLogitsWarper(options["top_k"])] if options["top_k"] else []
    warpers += [TopPLogitsWarper(options["top_p"])] if options["top_p"] < 1 else []
    warpers += [MinPLogitsWarper(options["min_p"])] if options["min_p"] else []
    apply: Any = LogitsProcessorList(warpers)
    likely_V = apply(torch.zeros(1, 1), found_1V.clone()).softmax(-1)[0]
    chance_V = chances(found_1V, [one.sampling])[0]
    assert ((chance_V > 0) == (likely_V > 0)).all()
    torch.testing.assert_close(chance_V / chance_V.sum(), likely_V, rtol=1e-4, atol=1e-7)
    assert likely_V[sample(x_1V, [one])[0]] > 0


def test_every_option_has_an_oracle():
    engine = {"max_tokens", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs"}  # test_request_options.py
    doors = {"stop", "n"}  # doors/test_stop_strings.py, doors/test_request_options.py
    draws = {"seed"}  # test_sampling.py
    assert {field.name for field in fields(SamplingParams)} == {*MIX, *engine, *doors, *draws}


def mixed(num):
    kinds = [
        {},
        {"penalty": 1.2},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "min_p": 0.1, "frequency_penalty": 0.5},
        {"logit_bias": ((7, 50.0),)},
        {"temperature": 1.0, "top_p": 0.7, "presence_penalty": 1.0, "penalty": 1.4},
        {"min_tokens": 64, "ends": (1, 2, 3)},
    ]
    return [sequence(s, **kinds[s % len(kinds)]) for s in range(num)]


def test_a_token_does_not_depend_on_batch_mates():
    x_BV, sequences = logits(28), mixed(28)
    together = sample(x_BV, sequences)
    assert together == [sample(x_BV[b : b + 1], [s])[0] for b, s in enumerate(sequences)]
    assert together == list(reversed(sample(x_BV.flip(0), sequences[::-1])))


def test_a_bias_of_100_decides_alone():
    x_BV = logits(1)
    one = sequence(0, temperature=1.0, logit_bias=((7, 100.0),))
    assert {sample(x_BV, [replace(one, seed=seed)])[0] for seed in range(20)} == {7}
    best = int(x_BV.argmax())
    other = sequence(0, logit_bias=((best, -100.0),))
    assert sample(x_BV, [other]) == [int(x_BV[0].topk(2).indices[1])]


def test_logprobs_are_the_log_softmax_of_the_model_s_own_logits():
    x_BV = logits(4)
    known = token_logprobs(x_BV, [3, 0, 699, 5], [0, 1, 5, 20])
    for row, logprob in enumerate(known):
        whole = x_BV[row].double().log_softmax(-1)
        assert logprob.logprob == pytest.approx(whole[logprob.token_id].item(), abs=1e-5)
        ids = whole.argsort(descending=True)[: (0, 1, 5, 20)[row]].tolist()
        assert [i for i, _ in logprob.top] == ids
        assert [v for _, v in logprob.top] == pytest.approx([whole[i].item() for i in ids], abs=1e-5)
    assert token_logprobs(x_BV[:0], [], []) == []
    assert all(math.isfinite(t.logprob) for t in known)

"""What a request asks for, through the engine: logprobs as the reference model has them, least lengths, priorities."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from pregate.base.errors import QueueFullError, UserError
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.link.messages import FinishedEvent, SamplingParams, SubmitRequest, TokensEvent
from tests.router.serving import engine_of, hosts_here

PROMPT = (1, *range(20, 44))


def run(engine):
    """Step to the end: per request its tokens, logprobs, prompt logprobs and why it ended."""
    found: dict = {}
    for _ in range(500):
        if not engine.has_work:
            engine.scheduler.allocator.check([])
            return found
        for event in engine.step():
            tokens = found.setdefault(event.request_id, {"ids": [], "logprobs": [], "prompt": [], "reason": None})
            if isinstance(event, TokensEvent):
                tokens["ids"] += event.token_ids
                tokens["logprobs"] += event.logprobs
                tokens["prompt"] += event.prompt_logprobs
            elif isinstance(event, FinishedEvent):
                tokens["reason"] = event.reason
    raise AssertionError("the engine did not come to an end")


@pytest.fixture(scope="module")
def engine(path_checkpoint):
    with engine_of(path_checkpoint, hosts_here(path_checkpoint, 1), step_tokens=8, max_running=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(path_checkpoint):
    return RoutedForCausalLM.from_pretrained(path_checkpoint).eval()


def submit(engine, name="a", prompt=PROMPT, priority=0, **sampling):
    params = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **sampling})
    engine.submit(SubmitRequest(name, tuple(prompt), params, priority=priority))


def test_logprobs_of_prompt_and_text_are_the_reference_s(engine, model):
    """In chunks of 8, beside another request, and though the prompt was computed before."""
    submit(engine, "before")
    run(engine)
    submit(engine, "a", logprobs=3, prompt_logprobs=2)
    submit(engine, "b", PROMPT[:13])
    done = run(engine)
    ids = [*PROMPT, *done["a"]["ids"]]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    known = [*done["a"]["prompt"], *done["a"]["logprobs"]]
    assert [t.token_id for t in known] == ids[1:]
    assert [len(t.top) for t in known] == [2] * (len(PROMPT) - 1) + [3] * 6
    for position, token in enumerate(known):
        assert token.logprob == pytest.approx(expected[position, token.token_id].item(), abs=1e-4)
        assert [v for _, v in token.top] == pytest.approx(
            expected[position].topk(len(token.top)).values.tolist(), abs=1e-4
        )
    assert done["b"]["prompt"] == done["b"]["logprobs"] == []


def test_prompt_logprobs_come_though_the_first_token_ends_the_text(engine):
    submit(engine, "free")
    first = run(engine)["free"]["ids"][0]
    submit(engine, "a", prompt_logprobs=0, stop_token_ids=(first,))
    done = run(engine)["a"]
    assert (done["ids"], done["reason"], len(done["prompt"])) == ([], "stop", len(PROMPT) - 1)


def test_logits_of_prompts_are_bounded_in_a_step(engine, monkeypatch):
    limits = replace(engine.scheduler.limits, prompt_logit_rows=3)
    monkeypatch.setattr(engine.scheduler, "limits", limits, raising=False)
    rows = []
    forward = engine.runner.backbone.forward
    monkeypatch.setattr(
        engine.runner.backbone, "forward", lambda *a: (rows.append(len(a[3])), forward(*a))[1], raising=False
    )
    submit(engine, "a", prompt_logprobs=0)
    submit(engine, "b", prompt_logprobs=0)
    done = run(engine)
    assert [len(done[name]["prompt"]) for name in "ab"] == [len(PROMPT) - 1] * 2
    assert max(rows) <= 3 + 2


def test_nothing_ends_a_text_before_min_tokens(engine):
    submit(engine, "free", max_tokens=12)
    free = run(engine)["free"]["ids"]
    submit(engine, "a", max_tokens=12, stop_token_ids=tuple(free[:3]), min_tokens=5)
    done = run(engine)["a"]
    assert len(done["ids"]) >= 5 and not set(done["ids"][:5]) & set(free[:3])


def test_a_text_ends_before_the_first_of_its_stop_ids(engine):
    """Every token of a text as the one that ends it, and the model's own end where it is not ignored."""
    submit(engine, "free", max_tokens=12)
    free = run(engine)["free"]
    assert (len(free["ids"]), free["reason"]) == (12, "length")
    ends = [(token,) for token in dict.fromkeys(free["ids"])] + [tuple(free["ids"][5:]), ()]
    for number, stop in enumerate(ends):
        submit(engine, str(number), max_tokens=12, stop_token_ids=stop)
    done = run(engine)
    for number, stop in enumerate(ends):
        first = next((n for n, token in enumerate(free["ids"]) if token in stop), 12)
        found = done[str(number)]
        assert (found["ids"], found["reason"]) == (free["ids"][:first], "stop" if first < 12 else "length")
    own, engine.admission = engine.admission, replace(engine.admission, eos_ids=frozenset(free["ids"][3:4]))
    for ignore_eos in (False, True):
        submit(engine, str(ignore_eos), max_tokens=12, ignore_eos=ignore_eos)
    done, engine.admission = run(engine), own
    assert done["True"]["ids"] == free["ids"]
    assert done["False"]["ids"] == free["ids"][: free["ids"].index(free["ids"][3])]


def test_the_lowest_priority_is_served_first(engine):
    for name, priority in (("one", 0), ("two", 0), ("late", 5), ("soon", -1)):
        submit(engine, name, priority=priority)
    order = []
    while engine.has_work:
        order += [e.request_id for e in engine.step() if isinstance(e, FinishedEvent)]
    assert order == ["soon", "one", "two", "late"]
    with pytest.raises(UserError, match="priority 4294967296: must be"):
        submit(engine, "x", priority=1 << 32)


def test_the_queue_is_bounded_by_prompt_tokens(path_checkpoint):
    with engine_of(path_checkpoint, hosts_here(path_checkpoint, 1), max_queued_tokens=30) as engine:
        submit(engine, "a")
        with pytest.raises(QueueFullError, match="holds 25 tokens of prompts, its bound is 30"):
            submit(engine, "b")
        run(engine)


def test_the_model_s_own_repetition_penalty_is_obeyed_by_engine_and_reference(path_checkpoint, tmp_path):
    folder = tmp_path / "penalised"
    shutil.copytree(path_checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.7}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"].pop("generation_config.json", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    model = RoutedForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "pad_token_id": 0, "do_sample": False}
    expected = {
        p: model.generate(ids, **options, **({"repetition_penalty": p} if p else {}))[0].tolist() for p in (None, 1.0)
    }
    assert expected[None] != expected[1.0], "the penalty must matter"
    with engine_of(folder, hosts_here(folder, 1)) as engine:
        for penalty in expected:
            submit(engine, str(penalty), max_tokens=40, repetition_penalty=penalty, ignore_eos=False)
        done = run(engine)
    for penalty, whole in expected.items():
        new = whole[len(PROMPT) :]
        assert done[str(penalty)]["ids"] == (new[:-1] if new[-1] == 2 else new)

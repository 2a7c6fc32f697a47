"""Paths are the same whole, in chunks, token by token, alone and in a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from pregate.base.errors import UserError
from pregate.kernels.reference import above, top_k
from pregate.model import path_router
from pregate.model.config import LayerCut, PathRouterConfig, RoutedConfig
from pregate.model.gates import Choice
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_router import PathComputer, PathRouter, PathState, choose_experts, split_layers
from pregate.model.paths import Paths

UNLIKE = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(7, 1, 2, 8)]
ALIKE = [LayerCut(5, 3, 3, 8), LayerCut(0, 1, 0, 8), LayerCut(5, 3, 3, 8)]


@dataclass(frozen=True)
class Kind:
    """One combination of a path router's options."""

    heads: str = "independent"
    gate: str = "scores"
    weights: str = "one"
    selection: str = "top_k"

    def __str__(self) -> str:
        return "-".join((self.heads, self.gate, self.weights, self.selection))

    @property
    def cuts(self) -> list[LayerCut]:
        return ALIKE if self.heads == "single" else UNLIKE

    @property
    def config(self) -> PathRouterConfig:
        return PathRouterConfig(16, 2, 4, 12, self.heads, self.gate, self.weights)


KINDS = [
    Kind(*choice)
    for choice in product(
        ("independent", "recurrent", "single"), ("scores", "dselect"), ("one", "learned"), ("top_k", "threshold")
    )
]


def random_router(kind: Kind) -> PathRouter:
    """A router with large random weights, and thresholds that about half of the scores reach."""
    torch.manual_seed(0)
    router = PathRouter(kind.config, 100, kind.cuts, kind.selection)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if kind.selection == "threshold":
        scores_NS = router(torch.tensor([prompt(60)]))[0][0].detach()
        layers = scores_NS.split([c.num_routed for c in kind.cuts], dim=-1)
        router.thresholds.copy_(torch.stack([x.median() if x.numel() else torch.zeros(()) for x in layers]))
    return router


@pytest.fixture(scope="module", params=KINDS, ids=str)
def every(request: pytest.FixtureRequest) -> PathComputer:
    """The runtime of a router of each kind."""
    return PathComputer(random_router(request.param))


@pytest.fixture(scope="module")
def computer() -> PathComputer:
    return PathComputer(random_router(Kind()))


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 100, size=length).tolist()


def whole(computer: PathComputer, ids: list[int]) -> np.ndarray:
    return route(computer, ids)[0]


def route(computer: PathComputer, ids: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids and weights of a sequence given whole."""
    paths = computer.extend([computer.new_state()], [ids])[0][0]
    return paths.ids, paths.weights


def in_chunks(computer: PathComputer, ids: list[int], size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The same given `size` tokens at a time."""
    state, parts = computer.new_state(), []
    for start in range(0, len(ids), size):
        (paths,), (state,) = computer.extend([state], [ids[start : start + size]])
        parts.append(paths)
    weights = [p.weights for p in parts if p.weights is not None]
    return np.concatenate([p.ids for p in parts]), np.concatenate(weights) if weights else None


def assert_same(one: tuple[np.ndarray, np.ndarray | None], other: tuple[np.ndarray, np.ndarray | None]) -> None:
    """Ids and weights equal to the last bit."""
    assert np.array_equal(one[0], other[0])
    if one[1] is None or other[1] is None:
        assert one[1] is other[1]
    else:
        assert np.array_equal(one[1], other[1])


def test_routers_under_test_tell_tokens_apart(every: PathComputer):
    """Else the equalities below would hold for nothing."""
    ids, weights = route(every, prompt(90))
    assert len(np.unique(ids, axis=0)) >= 4
    assert (weights is None) == (every.config.weights == "one")
    assert weights is None or len(np.unique(weights)) > 50


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("length", [1, 11, 90])
def test_chunks_change_nothing(every: PathComputer, length: int, size: int):
    ids = prompt(length)
    assert_same(in_chunks(every, ids, size), route(every, ids))


def test_chunks_of_the_runtime_itself_change_nothing(computer: PathComputer, monkeypatch: pytest.MonkeyPatch):
    import pregate.model.path_router as module

    ids = prompt(90)
    before = whole(computer, ids)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 13)
    assert np.array_equal(whole(computer, ids), before)


@pytest.mark.parametrize("window", [1, 12, 40])
def test_a_long_text_is_scored_in_pieces_and_trains_the_same(window: int, monkeypatch: pytest.MonkeyPatch):
    """Pieces shorter and longer than the window, after a past of another length in each row."""
    torch.manual_seed(0)
    router = PathRouter(PathRouterConfig(16, 2, 4, window), 100, UNLIKE).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    past_BN, ids_BN = (torch.tensor([prompt(n, seed) for seed in (1, 2)]) for n in (9, 90))
    past, past_len_B = router(past_BN)[1], torch.tensor([9, 4])
    sizes: list[int] = []
    router.blocks[0].register_forward_pre_hook(lambda _block, args: sizes.append(args[0].shape[1]))

    def scores_and_gradients(after: tuple[Any, ...]) -> list[torch.Tensor]:
        sizes.clear()
        scores_BNS = router(ids_BN, *after)[0]
        (scores_BNS.sin() * torch.linspace(0, 3, 90, dtype=torch.float64)[:, None]).sum().backward(retain_graph=True)
        gradients = [p.grad for p in router.parameters() if p.grad is not None]
        router.zero_grad()
        return [scores_BNS, *gradients]

    for after in ((), (past, past_len_B)):
        expected = scores_and_gradients(after)
        assert sizes == [90]
        with monkeypatch.context() as patch:
            patch.setattr(path_router, "CHUNK_TOKENS", 13)
            found = scores_and_gradients(after)
        assert sizes == [13] * 6 + [12]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_batch_mates_of_other_lengths_change_nothing(every: PathComputer):
    texts = [prompt(n, seed=n) for n in (3, 40, 17, 1)]
    states = [every.new_state() for _ in texts]
    firsts = [t[: len(t) // 2] for t in texts]
    early, states = every.extend(states, firsts)
    late, states = every.extend(states, [t[len(f) :] for t, f in zip(texts, firsts, strict=True)])
    for text, a, b in zip(texts, early, late, strict=True):
        both = Paths.concatenate([a, b])
        assert_same((both.ids, both.weights), route(every, text))


class _Calls(TorchDispatchMode):
    """Counts torch's operations."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(kind: Kind, num_sequences: int, num_layers: int) -> int:
    """How many operations extend so many sequences of unlike length by a token each."""
    router = PathRouter(
        kind.config, 100, [LayerCut(6, 2, 2, 8), LayerCut(4, 4, 1, 8)] * (num_layers // 2), kind.selection
    )
    computer = PathComputer(router)
    texts = [prompt(3 + n % 20, seed=n) for n in range(num_sequences)]
    states = computer.extend([computer.new_state()] * num_sequences, texts)[1]
    with _Calls() as calls:
        computer.extend(states, [[n % 100] for n in range(num_sequences)])
    return calls.num_calls


@pytest.mark.parametrize("weights", ["one", "learned"])
@pytest.mark.parametrize("selection", ["top_k", "threshold"])
def test_a_decode_step_takes_the_same_calls_whatever_its_sequences_and_layers(selection: str, weights: str):
    kind = Kind(selection=selection, weights=weights)
    assert calls_of_a_step(kind, 2, 2) == calls_of_a_step(kind, 33, 2) == calls_of_a_step(kind, 33, 16)


@pytest.mark.parametrize("selection", ["top_k", "threshold"])
def test_all_layers_at_once_choose_as_each_by_itself(selection: str):
    """Of unlike layers, with many ties; thresholds that every, some and no scores reach."""
    cuts = [
        LayerCut(7, 1, 3, 8),
        LayerCut(0, 8, 0, 8),
        LayerCut(4, 1, 0, 8),
        LayerCut(2, 1, 2, 8),
        LayerCut(64, 1, 9, 8),
    ]
    router = PathRouter(PathRouterConfig(dim=4), 10, cuts, selection)
    router.thresholds.copy_(torch.tensor([-torch.inf, torch.inf, 0.0, torch.inf, 1.0]))
    scores_NS = torch.randint(-3, 4, (50, 77), generator=torch.Generator().manual_seed(0)).double()
    ids_NLK = choose_experts(router, scores_NS).ids
    for layer, (cut, scores) in enumerate(zip(cuts, split_layers(scores_NS, cuts), strict=True)):
        expected = (
            above(scores, router.thresholds[layer]) if selection == "threshold" else top_k(scores, cut.num_active)
        )
        expected = expected if cut.num_active else expected[:, :0]
        width = expected.shape[1]
        assert torch.equal(ids_NLK[:, layer, :width], expected)
        assert (ids_NLK[:, layer, width:] == -1).all()


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """For each time experts are chosen: of how many tokens, and on which device their scores lie."""
    seen: list[tuple[int, str]] = []
    original = path_router.choose_experts

    def choose(router: PathRouter, scores_NS: torch.Tensor) -> Choice:
        seen.append((len(scores_NS), scores_NS.device.type))
        if scores_NS.device.type == "cpu":
            return original(router, scores_NS)
        return Choice(torch.empty(0, len(router.cuts), 0, dtype=torch.int64))

    monkeypatch.setattr(path_router, "choose_experts", choose)
    return seen


def test_experts_are_chosen_once_a_call_and_of_no_tokens_only_where_there_are_none(
    computer: PathComputer, scored: list[tuple[int, str]]
):
    states = computer.extend([computer.new_state()] * 2, [prompt(3), prompt(1)])[1]
    assert scored == [(4, "cpu")]
    scored.clear()
    paths, _ = computer.extend(states, [prompt(1), []])
    assert scored == [(1, "cpu"), (0, "cpu")]
    assert [p.num_tokens for p in paths] == [1, 0]


def test_scores_of_no_tokens_lie_where_thresholds_and_scale_do(scored: list[tuple[int, str]]):
    elsewhere = PathComputer(random_router(Kind(weights="learned", selection="threshold")).to("meta"))
    (paths,), _ = elsewhere.extend([elsewhere.new_state()], [[]])
    assert scored == [(0, "meta")]
    assert paths.num_tokens == 0


def test_paths_of_no_tokens_join_those_of_others(every: PathComputer):
    paths, _ = every.extend([every.new_state()] * 2, [prompt(5), []])
    both = Paths.concatenate(paths)
    assert_same((both.ids, both.weights), route(every, prompt(5)))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that starts anew with every call (the released Read-ME code, by default)."""
    original = PathRouter.encode
    monkeypatch.setattr(PathRouter, "encode", lambda self, ids, past, past_len: original(self, ids, past, past_len * 0))


def see_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention to the padding before a shorter mate's past."""
    original = path_router.RouterBlock._bias
    monkeypatch.setattr(
        path_router.RouterBlock,
        "_bias",
        lambda self, new, keys, past_len: original(self, new, keys, past_len * 0 + keys),
    )


def lose_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state one token shorter than the window needs."""
    original = PathComputer._keep

    def shorter(self: PathComputer, *args: Any) -> list[PathState]:
        return [PathState(state.kept[1:]) for state in original(self, *args)]

    monkeypatch.setattr(PathComputer, "_keep", shorter)


@pytest.mark.parametrize("defect", [forget, see_padding, lose_a_token])
def test_a_router_that_pads_caches_or_chunks_wrongly_is_found_out(
    every: PathComputer, monkeypatch: pytest.MonkeyPatch, defect: Callable[[pytest.MonkeyPatch], None]
):
    """Texts of unlike length at once, in three calls: what the tests above compare is then no longer the same."""
    texts = [prompt(n, seed=n) for n in (*range(6, 24), 60, 70, 80, 90)]
    right = [route(every, text)[0] for text in texts]
    defect(monkeypatch)
    states, parts = [every.new_state()] * len(texts), []
    for third in range(3):
        pieces = [t[len(t) * third // 3 : len(t) * (third + 1) // 3] for t in texts]
        paths, states = every.extend(states, pieces)
        parts.append(paths)
    wrong = [Paths.concatenate(p).ids for p in zip(*parts, strict=True)]
    assert any(not np.array_equal(a, b) for a, b in zip(right, wrong, strict=True))


def test_routing_is_causal(every: PathComputer):
    ids = prompt(40)
    changed = [*ids[:25], *prompt(15, seed=9)]
    assert np.array_equal(whole(every, ids)[:25], whole(every, changed)[:25])
    assert not np.array_equal(whole(every, ids), whole(every, changed))


def test_state_is_bounded_by_the_window(every: PathComputer):
    """The last 11 tokens of each block and nothing else, however long the text and however it comes."""
    state = every.new_state()
    for size in (1, 3, 90, 1, 200):
        _, (state,) = every.extend([state], [prompt(size)])
        assert state.length <= every.config.window - 1
        assert state.kept.untyped_storage().nbytes() <= 2 * 2 * 11 * 16 * 8
    assert state.kept.shape == (11, 4, 16)


def test_paths_fit_their_layers(every: PathComputer):
    paths = every.extend([every.new_state()], [prompt(30)])[0][0]
    paths.check(every.cuts)
    assert (paths.ids[:, 1] == -1).all()
    for layer, cut in enumerate(every.cuts):
        sizes = set((paths.ids[:, layer] >= 0).sum(axis=-1).tolist())
        assert sizes == {cut.num_active} or (every._router.selection == "threshold" and max(sizes) <= cut.num_routed)
    if every.config.heads == "single":
        assert np.array_equal(paths.ids[:, 0], paths.ids[:, 2])


def test_ties_go_to_the_lower_id_in_every_batch_shape():
    router: Any = random_router(Kind())
    with torch.no_grad():
        router.heads.weight[3] = router.heads.weight[1]  # experts 1 and 3 of layer 0 tie in exact arithmetic
        router.heads.bias[3] = router.heads.bias[1]
    computer, ids = PathComputer(router), prompt(60, seed=4)
    one = whole(computer, ids)[:, 0]
    assert np.array_equal(in_chunks(computer, ids, 1)[0][:, 0], one)
    has_3 = (one == 3).any(axis=-1)
    assert has_3.any()
    assert (one[has_3] == 1).any(axis=-1).all()


def tiny_model(kind: Kind) -> RoutedForCausalLM:
    """A random model of three layers, routed by paths of a router of this kind."""
    parent = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    cuts = [asdict(c) for c in kind.cuts]
    config = RoutedConfig(parent, cuts, routing="path", selection=kind.selection, path_router=asdict(kind.config))
    model = RoutedForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.path_router = random_router(kind)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_saved_model_routes_and_computes_the_same(kind: Kind, tmp_path: Path):
    """Whole and again from a cache, padded on the left; weights are followed through."""
    model, ids = tiny_model(kind), torch.tensor([prompt(30)])
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = RoutedForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert_same(route(again.path_computer, ids[0].tolist()), route(model.path_computer, ids[0].tolist()))
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-4, atol=1e-4)
    first = again(ids[:, :13], use_cache=True)
    rest = again(ids[:, 13:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), logits, rtol=1e-4, atol=1e-4)
    padded, mask = torch.cat([ids.new_full((1, 4), 9), ids], dim=1), torch.ones(1, 34, dtype=torch.int64)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    shifted = again(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    torch.testing.assert_close(shifted, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_learned_weights_reach_the_experts(tmp_path: Path):
    model, ids = tiny_model(Kind(weights="learned")), torch.tensor([prompt(30)])
    assert model.path_router is not None
    logits = model(ids).logits
    model.path_router.scale.zero_()
    model.forget_path_computer()
    assert model.paths(ids[0].tolist()).weights is None
    assert not torch.allclose(model(ids).logits, logits, atol=1e-2)


def test_weights_by_hand_and_their_gradient():
    cuts = [LayerCut(2, 0, 1, 1), LayerCut(2, 0, 1, 1)]
    router = PathRouter(PathRouterConfig(dim=4, weights="learned"), 10, cuts)
    scores = torch.tensor([[0.0, 0.0, 0.0, 3.0**0.5]])
    with torch.no_grad():
        assert router.expert_weights(scores) is None
    weights = router.expert_weights(scores)
    assert weights is not None
    assert weights.tolist() == [[1.0] * 4]
    weights.sum().backward()
    assert router.scale.grad is not None
    expected = torch.tensor([0.5, 0.5, *torch.tensor([0.0, 3.0**0.5]).softmax(0).tolist()])
    torch.testing.assert_close(router.scale.grad, expected)
    router.scale.data += torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen = choose_experts(router.requires_grad_(False), scores)
    assert chosen.ids.tolist() == [[[0], [1]]]
    assert chosen.weights is not None
    assert chosen.weights.flatten().tolist() == pytest.approx([1.5, 1 + 4 * expected[3].item()], abs=1e-6)


def test_a_config_of_before_still_names_a_router():
    """What earlier checkpoints hold: four fields."""
    config = RoutedConfig(LlamaConfig(), path_router={"dim": 128, "num_blocks": 1, "num_heads": 4, "window": 64})
    shape = config.router_shape
    assert (shape.heads, shape.gate, shape.weights) == ("independent", "scores", "one")
    names = set(PathRouter(shape, 10, UNLIKE).state_dict())
    assert {"embedding.weight", "heads.weight", "heads.bias"} < names and "scale" not in names


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window": 0}, "--window 0: allowed: 1 or more"),
        ({"num_blocks": 0}, "--blocks 0: allowed: 1 or more"),
        ({"heads": "double"}, "--heads double: allowed: independent, recurrent, single"),
        ({"gate": "soft"}, "--gate soft: allowed: scores, dselect"),
        ({"weights": "two"}, "--weights two: allowed: one, learned"),
    ],
)
def test_options_that_are_refused(change: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        PathRouterConfig(**change)


def test_one_index_for_unlike_layers_is_refused():
    with pytest.raises(UserError, match=r"--heads single: .* found 2 of 7, 3 of 5 active"):
        PathRouter(PathRouterConfig(heads="single"), 10, UNLIKE)

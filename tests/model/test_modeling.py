"""The reference model: cached, padded, whole; the same answer."""

import pytest
import torch

from pregate.base.errors import UserError
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.path_computer import PathComputer


@pytest.fixture(scope="module", params=["layerwise", "path"])
def model(request, tiny_layerwise_checkpoint, tiny_path_checkpoint):
    path = tiny_path_checkpoint if request.param == "path" else tiny_layerwise_checkpoint
    return RoutedForCausalLM.from_pretrained(path).eval()


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 512, (n,), generator=generator) for n in lengths]


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


def test_cached_generation_equals_recomputation(model):
    (ids,) = prompts(20)
    assert torch.equal(generate(model, ids[None]), generate(model, ids[None], use_cache=False))


def test_left_padding_in_a_batch_changes_no_text(model):
    short, long = prompts(7, 19)
    padded = torch.zeros(2, 19, dtype=torch.int64)
    padded[0, 12:], padded[1] = short, long
    mask = (padded != 0).long()
    together = generate(model, padded, attention_mask=mask)[:, 19:]
    assert torch.equal(together[0], generate(model, short[None])[0, 7:])
    assert torch.equal(together[1], generate(model, long[None])[0, 19:])


def test_chunked_prefill_gives_the_same_logits(model):
    (ids,) = prompts(30)
    with torch.no_grad():
        whole = model(ids[None]).logits
        first = model(ids[None, :11], use_cache=True)
        second = model(ids[None, 11:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, second.logits], dim=1), whole, atol=1e-4)


def test_a_foreign_cache_is_refused(tiny_path_checkpoint):
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval()
    (ids,) = prompts(8)
    with torch.no_grad():
        cache = model(ids[None], use_cache=True).past_key_values
        del cache.pregate_path_states
        with pytest.raises(ValueError, match="path router's state is missing"):
            model(ids[None, :1], past_key_values=cache)


def test_beam_search_on_paths_is_refused(tiny_path_checkpoint):
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint).eval()
    (ids,) = prompts(8)
    with pytest.raises(ValueError, match="beam"):
        generate(model, ids[None], num_beams=2)


def test_layerwise_checkpoints_have_no_paths(tiny_layerwise_checkpoint):
    model = RoutedForCausalLM.from_pretrained(tiny_layerwise_checkpoint)
    with pytest.raises(UserError, match="pregate decouple"):
        model.paths([1, 2, 3])


def test_paths_survive_save_and_reload(tiny_path_checkpoint, tmp_path):
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint)
    ids = prompts(40)[0].tolist()
    model.save_pretrained(tmp_path / "again")
    again = RoutedForCausalLM.from_pretrained(tmp_path / "again")
    assert (model.paths(ids).ids == again.paths(ids).ids).all()


def test_the_same_paths_in_a_padded_batch_and_alone(tiny_path_checkpoint):
    model = RoutedForCausalLM.from_pretrained(tiny_path_checkpoint)
    computer: PathComputer = model.path_computer
    short, long = prompts(9, 25)
    padded = torch.full((2, 25), 7)
    padded[0, 16:], padded[1] = short, long
    mask = torch.ones_like(padded)
    mask[0, :16] = 0
    (paths, _), _ = model.batch_paths(padded, mask, [computer.new_state(), computer.new_state()])
    assert (paths[0, :16] == -1).all()
    assert (paths[0, 16:].numpy() == model.paths(short.tolist()).ids).all()
    assert (paths[1].numpy() == model.paths(long.tolist()).ids).all()

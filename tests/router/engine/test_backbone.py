"""Logits of a step through paged attention and hosts are those of the reference model, in fp32."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.model.paths import Paths
from pregate.router.engine.backbone import Backbone
from pregate.router.engine.channel_exchange import ChannelExchange
from pregate.router.engine.kv_cache import PagedKV
from pregate.router.engine.members import Members
from pregate.router.engine.shared_experts import SharedExperts
from pregate.router.engine.step_layout import SequenceSlice, StepLayout
from tests.router.serving import hosts_here, placement_of

NUM_HOSTS, NUM_BLOCKS, BLOCK = 2, 16, 4
TOLERANCE = 1e-4
#: Two texts of byte tokens, and the cache blocks of each: side by side, and here and there.
TEXTS = [[(7 * n + 3) % 251 for n in range(20)], [(11 * n + 5) % 253 for n in range(17)]]
BLOCKS = [[1, 2, 3, 4, 5], [15, 7, 9, 8, 6]]


class Run:
    """A backbone over hosts in this process, beside the reference's logits of both texts."""

    def __init__(self, path: Path) -> None:
        self.model = RoutedForCausalLM.from_pretrained(path).float().eval()
        with torch.inference_mode():
            self.wanted = [self.model(torch.tensor([text]), use_cache=False).logits[0] for text in TEXTS]
        clients, reader = hosts_here(path, NUM_HOSTS), CheckpointReader(path)
        shared = SharedExperts(reader.config, torch.device("cpu"), torch.float32)
        self.exchange = ChannelExchange("engine", Members(clients, placement_of(path, NUM_HOSTS)[..., None]), shared)
        for client in clients:
            terms = {"dtype": torch.float32, "width": reader.hidden_size, "max_rows": 64}
            client.hello(engine="engine", fingerprint=reader.fingerprint, **terms)
        self.backbone = Backbone.load(path, self.exchange, "float32", "cpu")
        self.kv = PagedKV(NUM_BLOCKS, BLOCK, self.backbone.kv_shapes)
        self.num_steps = 0

    def step(self, pieces: list[tuple[int, int, int]], wanted: list[int] | None = None) -> None:
        """Run (text, start, stop) of each piece, single tokens first; hold the logits of the rows `wanted`, or all."""
        self.num_steps += 1
        layout = StepLayout.build(self.kv, [SequenceSlice(BLOCKS[text], start, stop) for text, start, stop in pieces])
        token_ids = np.concatenate([TEXTS[text][start:stop] for text, start, stop in pieces])
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in pieces])
        rows = wanted if wanted is not None else list(range(len(token_ids)))
        self.exchange.begin_step(self.num_steps, len(token_ids), self._paths(pieces))
        logits_BV = self.backbone.forward(token_ids, positions, layout, rows)
        assert self.exchange.end_step().sum() == len(token_ids) * 3 * 3, "three layers of three experts each"
        expected = torch.cat([self.wanted[text][start:stop] for text, start, stop in pieces])[rows]
        assert logits_BV.shape == expected.shape
        torch.testing.assert_close(logits_BV, expected, rtol=0, atol=TOLERANCE)

    def _paths(self, pieces: list[tuple[int, int, int]]) -> Paths | None:
        if self.model.config.routing != "path":
            return None
        return Paths.concatenate([self.model.paths(TEXTS[text])[start:stop] for text, start, stop in pieces])


@pytest.fixture(params=["layerwise", "path"])
def run(request) -> Run:
    return Run(request.getfixturevalue(f"{request.param}_checkpoint"))


def test_no_weight_stays_mapped_to_its_file(path_checkpoint, tmp_path):
    """Whoever writes over the file would change what is served, and its pages would count as the engine's memory."""
    folder = shutil.copytree(path_checkpoint, tmp_path / "copy")
    backbone = Backbone.load(folder, Run(path_checkpoint).exchange, "float32", "cpu")
    assert backbone.dtype == torch.float32
    assert str(folder) not in Path("/proc/self/maps").read_text()


def test_chunks_of_prompts(run):
    run.step([(0, 0, 9)])
    run.step([(0, 9, 20), (1, 0, 17)])
    assert run.wanted[0].std() > 100 * TOLERANCE, "the logits are large enough to differ"


def test_a_decode_batch(run):
    run.step([(0, 0, 12), (1, 0, 6)])
    for offset in range(3):
        run.step([(0, 12 + offset, 13 + offset), (1, 6 + offset, 7 + offset)])


def test_decodes_and_a_chunk_together(run):
    run.step([(0, 0, 12)])
    run.step([(0, 12, 13), (1, 0, 9)])
    run.step([(1, 9, 10), (0, 13, 20)])


def test_only_the_rows_that_are_wanted(run):
    run.step([(0, 0, 5), (1, 0, 6)], wanted=[10, 4])
    run.step([(0, 5, 6), (1, 6, 9)], wanted=[0])
    run.step([(1, 9, 12)], wanted=[])

"""Units that change hosts, and hosts that come and go, between the steps of running requests."""

from typing import Any

import numpy as np
import pytest

from pregate.cluster.placement import Placement, place
from pregate.cluster.rebalance import moved, moves
from pregate.model.checkpoint import CheckpointReader
from pregate.model.modeling import RoutedForCausalLM
from pregate.router.link.messages import SamplingParams, SubmitRequest, TokensEvent
from pregate.workers.client.host_client import InProcessClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from tests.equality import Tally, reference_texts
from tests.router.serving import engine_of, hosts_here

NUM_TOKENS = 24


@pytest.mark.parametrize("batching", ["fifo", "path"])
@pytest.mark.parametrize("kind", ["path", "layerwise"])
def test_from_two_hosts_to_three_and_to_one(request, kind, batching):
    path = request.getfixturevalue(f"tiny_{kind}_checkpoint")
    reference = RoutedForCausalLM.from_pretrained(path).eval()
    rng = np.random.default_rng(3)
    prompts = [[1, *rng.integers(3, 512, size=n).tolist()] for n in (5, 9, 30, 17)]
    references = reference_texts(reference, prompts, NUM_TOKENS)
    num_routed = [cut.num_routed for cut in CheckpointReader(path).config.cuts]
    clients = hosts_here(path, 2)
    with engine_of(path, clients, batching=batching, step_tokens=32) as engine:
        served: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            engine.submit(SubmitRequest(str(number), tuple(prompt), SamplingParams(NUM_TOKENS, ignore_eos=True)))
        hosts: list[Any] = [client._host for client in clients]
        hosts.append(ExpertHost(CheckpointReader(path), (), HostOptions(host_id=2)))
        engine.replace_host(2, InProcessClient(hosts[-1]))
        now = Placement(1, 3, place(num_routed, 2).copies)
        goals = [place(num_routed, 3, "round_robin"), Placement(1, 3, place(num_routed, 1).copies)]
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, TokensEvent):
                    served.setdefault(event.request_id, []).extend(event.token_ids)
            if not goals:
                continue
            if some := moves(now, goals[0], 4, np.ones(now.copies.shape[:2]), -np.inf):
                before, now = now, moved(now, some)
                for number, host in enumerate(hosts):
                    host.hold({*before.units_of(number), *now.units_of(number)})
                engine.place(now.copies, 3)
                for number, host in enumerate(hosts):
                    host.hold(now.units_of(number))
                    assert host.status()["num_units"] == len(now.units_of(number))
            elif len(goals) == 2:
                del goals[0]
            else:
                del goals[0]
                engine.place(now.copies, 1)
                assert len(engine.info()["hosts"]) == 1
        assert not goals, "the requests ended before the moves"
        assert sum(host.status()["misses"] for host in hosts) == 0, "who is asked holds what it is asked for"
    tally = Tally()
    for number, reference in enumerate(references):
        tally.compare_text(f"prompt {number}", reference, served[str(number)])
    tally.check()

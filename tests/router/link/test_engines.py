"""Several engines over one pool of hosts, to a door as one: what one that dies has begun goes on at another."""

import asyncio
import os
import threading
from contextlib import ExitStack, aclosing, closing

import pytest

from pregate.base.errors import DeadlineError, UnavailableError
from pregate.model.checkpoint import CheckpointReader
from pregate.router.engine.last_paths import NUM_REQUESTS
from pregate.router.link.client import EngineClient
from pregate.router.link.engine_health import EngineClientOptions
from pregate.router.link.engines import Engines
from pregate.router.link.messages import FinishedEvent, SamplingParams, SubmitRequest, TokensEvent
from pregate.workers.client.channel import ChannelClient
from pregate.workers.host.host import ExpertHost
from pregate.workers.host.options import HostOptions
from pregate.workers.host.server import HostServer, ServerOptions
from pregate.workers.link.protocol import HostAddress
from tests.chaos.proxy import DOWN, UP, Fault, Proxy
from tests.router.running import LoopThread, RawDoor, engine_thread, slow_steps, socket_folder
from tests.router.serving import engine_of, placement_of, units_of

NUM_PROMPTS, NUM_TOKENS = 16, 24
SAMPLING = SamplingParams(NUM_TOKENS, ignore_eos=True)


class Pool:
    """Two engines, each with a server, over two hosts that both share, and a door's end of them."""

    def __init__(self, checkpoint, stack: ExitStack) -> None:
        folder, reader = stack.enter_context(socket_folder()), CheckpointReader(checkpoint)
        addresses, hosts_of = [], placement_of(checkpoint, 2)
        for number in range(2):
            host = ExpertHost(reader, units_of(hosts_of, number), HostOptions(host_id=number))
            server = HostServer(host, ServerOptions(f"ipc://{folder}/h/{number}"))
            server.start()
            stack.callback(server.stop)
            addresses.append(HostAddress(number, server.endpoint, host.incarnation, os.getpid(), "127.0.0.1"))
        self.endpoints = [f"ipc://{folder}/engine-{number}" for number in range(2)]
        self.engines = [
            stack.enter_context(engine_of(checkpoint, [ChannelClient(a) for a in addresses], max_running=NUM_PROMPTS))
            for _ in self.endpoints
        ]
        for engine in self.engines:
            slow_steps(engine, 0.01)
        self.stops: list[threading.Event] = [
            stack.enter_context(engine_thread(engine, endpoint))
            for engine, endpoint in zip(self.engines, self.endpoints, strict=True)
        ]
        self.loop = LoopThread()
        stack.callback(self.loop.close)
        self.door = Engines([EngineClient(e, options=EngineClientOptions(frozen_s=2.0)) for e in self.endpoints])
        stack.callback(lambda: self.loop.call(self.door.close()))

    def ask(self, requests: list[SubmitRequest], at_token=None) -> list[tuple[list[int], list[FinishedEvent]]]:
        """Ids and ends of requests at once; `at_token(n)` hears of the n-th token of all."""
        num_tokens = 0

        async def one(request):
            nonlocal num_tokens
            ids, ends = [], []
            async with aclosing(self.door.generate(request)) as events:
                async for event in events:
                    if isinstance(event, TokensEvent):
                        ids += event.token_ids
                        for _ in event.token_ids:
                            num_tokens += 1
                            if at_token is not None:
                                at_token(num_tokens)
                    else:
                        ends.append(event)
            return ids, ends

        async def every():
            return await asyncio.gather(*map(one, requests))

        return self.loop.call(every(), 100)


@pytest.fixture
def pool(tiny_path_checkpoint):
    with ExitStack() as stack:
        yield Pool(tiny_path_checkpoint, stack)


def requests(name: str, num: int = NUM_PROMPTS, **options) -> list[SubmitRequest]:
    return [
        SubmitRequest(f"{name}{n}", (1, 40 + n, 41, *range(50, 50 + 2 * n)), SAMPLING, **options) for n in range(num)
    ]


@pytest.mark.slow
def test_what_an_engine_that_dies_has_begun_goes_on_at_another(pool):
    whole = [ids for ids, _ in pool.ask(requests("a"))]
    infos, both = [engine.info() for engine in pool.engines], pool.loop.call(pool.door.info())
    assert all(info["num_steps"] > 5 for info in infos), "both had something to do"
    assert both["vocab_size"] == infos[0]["vocab_size"]
    assert both["kv_blocks"] == sum(info["kv_blocks"] for info in infos)
    assert both["hosts"][1]["rows"] == sum(info["hosts"][1]["rows"] for info in infos)
    told = both["last_paths"]
    assert len(told) == 2 * NUM_REQUESTS == len({(request["prompt_tokens"], request["ended_s"]) for request in told})
    assert [request["ended_s"] for request in told] == sorted(request["ended_s"] for request in told)
    assert len({tuple(ids) for ids in whole}) == NUM_PROMPTS

    def stop_one(num_tokens):
        if num_tokens == NUM_PROMPTS * NUM_TOKENS // 3:
            pool.stops[0].set()

    found = pool.ask(requests("b"), stop_one)
    assert [ids for ids, _ in found] == whole
    for number, (_, ends) in enumerate(found):
        (end,) = ends
        assert (end.reason, end.prompt_tokens, end.completion_tokens) == ("length", 3 + 2 * number, NUM_TOKENS)
    info = pool.loop.call(pool.door.info())
    assert info["num_running"] == 0 and [host["lost"] for host in info["hosts"]] == ["", ""]
    lives, gone = pool.engines[1].info(), infos[0]
    assert info["num_steps"] == lives["num_steps"] + gone["num_steps"], "what it last said it had done counts on"
    assert info["kv_blocks"] == lives["kv_blocks"]
    for now, then, before in zip(info["hosts"], lives["hosts"], both["hosts"], strict=True):
        for name in ("rows", "groups", "reply_bytes"):
            assert now[name] >= before[name] > 0, "what was sent to hosts counts on"
        assert now["rows"] == then["rows"] + gone["hosts"][now["host_id"]]["rows"]
    dead, other = info["engines"]
    assert (dead["number"], other["number"]) == (0, 1)
    assert "engine" in dead["unavailable"] and not other["unavailable"]
    assert (other["num_running"], other["num_steps"]) == (0, lives["num_steps"])
    with pytest.raises(DeadlineError):
        pool.ask(requests("c", 1, deadline_s=0.05))
    pool.stops[1].set()
    with pytest.raises(UnavailableError):
        pool.ask(requests("d", 2))


@pytest.mark.slow
def test_what_an_engine_that_stands_still_has_begun_goes_on_at_another(pool):
    """Its connection is there, and nothing comes through: as of a process that is stopped."""
    whole = [ids for ids, _ in pool.ask(requests("a"))]
    pool.loop.call(pool.door.close())
    with closing(Proxy(pool.endpoints[0], parts=("",))) as proxy:
        pool.door = Engines([EngineClient(e, options=EngineClientOptions(frozen_s=2.0)) for e in pool.endpoints])

        def freeze(num_tokens):
            if num_tokens == NUM_PROMPTS * NUM_TOKENS // 3:
                proxy.fault = Fault(swallow=frozenset({UP, DOWN}))

        assert [ids for ids, _ in pool.ask(requests("b"), freeze)] == whole
        still, other = pool.loop.call(pool.door.info())["engines"]
        assert "silent" in still["unavailable"] and not other["unavailable"]


def test_a_request_that_comes_twice_is_run_once(pool):
    (request,) = requests("twice", 1)
    with RawDoor(pool.endpoints[0]) as door, RawDoor(pool.endpoints[0]) as other:
        door.send(request, request)
        ids = list(door.receive(TokensEvent).token_ids)  # whose it is, is settled
        door.send(request)
        other.send(request)
        while len(ids) < NUM_TOKENS:
            ids += door.receive(TokensEvent).token_ids
        assert door.receive(FinishedEvent).completion_tokens == NUM_TOKENS
        assert door.look(TokensEvent, 0.3) is None
    assert ids == pool.ask(requests("once", 1))[0][0]


def test_a_route_is_asked_of_another_engine_where_one_is_gone(pool):
    """As a door asks: with the trace of who called."""

    async def ask():
        return await pool.door.route((1, 40, 41), 30.0, traceparent="")

    def paths_of(asked):
        return pool.loop.call(asked).paths.slice(0, 3)

    before = paths_of(ask())
    assert before.num_tokens == 3
    pool.stops[0].set()
    for _ in range(4):  # whichever it chooses
        assert (paths_of(ask()).ids == before.ids).all()

"""The client for asyncio says what the other one says."""

import asyncio

import pytest

from pregate import AsyncClient
from pregate.base.errors import DeadlineError, UnavailableError, UserError
from tests.router.running import served, slow_steps, wait_for


@pytest.fixture(scope="module")
def front(tiny_path_checkpoint):
    with served(tiny_path_checkpoint) as (engine, front):
        slow_steps(engine, 0.005)
        yield engine, front


def run(front, use):
    async def main():
        async with AsyncClient(front[1].target, timeout_s=60) as client:
            return await use(client)

    return asyncio.run(main())


def test_it_answers_as_the_client_does(front):
    client = front[1].client

    async def ask(client):
        call = client.generate("O wind", 8, ignore_eos=True)
        chunks = [chunk async for chunk in call]
        whole = await client.complete("O wind", 8, ignore_eos=True)
        assert "".join(c.text for c in chunks) == call.completion.text == whole.text
        assert await client.health() and await client.health("")
        return whole, await client.route("O wind"), await client.model_info(), await client.loads()

    whole, route, info, loads = run(front, ask)
    expected = client.complete("O wind", 8, ignore_eos=True)
    assert (whole.text, whole.token_ids) == (expected.text, expected.token_ids)
    assert route == client.route("O wind")
    assert (info.model, info.num_layers) == ("tiny", client.model_info().num_layers)
    assert loads.kv_blocks == client.loads().kv_blocks > 0


def test_many_at_once_and_one_that_is_cancelled(front):
    async def ask(client):
        gone = client.generate("O wind", 200, ignore_eos=True)
        await anext(gone)
        answers = await asyncio.gather(*(client.complete("O wind", 8, ignore_eos=True) for _ in range(8)))
        gone.cancel()
        assert [chunk async for chunk in gone] == []
        return answers

    assert len({answer.text for answer in run(front, ask)}) == 1
    wait_for(lambda: not front[0].has_work, what="an idle engine")


def test_a_task_that_is_cancelled_gives_its_request_up(front):
    async def ask(client):
        task = asyncio.ensure_future(client.complete("O wind", 200, ignore_eos=True))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(front, ask)
    wait_for(lambda: not front[0].has_work, what="an idle engine")


def test_abort_and_errors(front):
    async def ask(client):
        call = client.generate("O wind", 200, ignore_eos=True)
        await anext(call)
        assert await client.abort(call.request_id) == (call.request_id,)
        _ = [chunk async for chunk in call]
        assert call.completion.finish_reason == "abort"
        with pytest.raises(UserError, match="top_p"):
            await client.complete("x", 2, top_p=7.0)
        with pytest.raises(DeadlineError):
            await client.complete("O wind", 200, ignore_eos=True, timeout_s=0.2)

    run(front, ask)

    async def nobody():
        async with AsyncClient("127.0.0.1:1", timeout_s=5, retry_s=0.2) as client:
            with pytest.raises(UnavailableError):
                await client.model_info()

    asyncio.run(nobody())

"""The live page in a real browser: what lives where and is in memory, also when a host is killed; a prompt's text and
path, and the paths of other clients' requests; and nothing that it shows is run."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from pregate.client.client import Client
from pregate.router.doors.access import AccessOptions, TokenFile
from pregate.router.doors.grpc_options import GrpcOptions
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.chaos.hosts import Cluster
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import door, engine_thread, socket_folder, wait_for
from tests.router.serving import engine_of, placement_of

SHIPPED = Path(__file__).resolve().parents[3] / "examples" / "quartet-paths"
HOSTILE = "<img src=x onerror=document.title='run'> It was a cold evening"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    cluster = Cluster(
        SHIPPED, placement_of(SHIPPED, 2)[..., None], tmp_path_factory.mktemp("ipc"), resident_experts=0.6
    )
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def doors(hosts, tmp_path_factory):
    """Of two host processes, each with room for a part of its experts: the addresses for HTTP and for gRPC."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("secret\nother\n")
    over_grpc = GrpcOptions(port=0, access=AccessOptions(token_file=tokens))
    with ExitStack() as stack:
        engine = stack.enter_context(engine_of(SHIPPED, [hosts.client(0), hosts.client(1)], step_tokens=40))
        endpoint = f"ipc://{stack.enter_context(socket_folder())}/engine.sock"
        stack.enter_context(engine_thread(engine, endpoint))
        server = HttpServer(
            build_app(DoorService(EngineClient(endpoint), SHIPPED, "quartet"), tokens=TokenFile(tokens))
        )
        yield server.url, stack.enter_context(door(endpoint, SHIPPED, grpc_options=over_grpc)).target
        server.close()


@pytest.fixture(scope="module")
def url(doors):
    return doors[0]


def test_it_is_one_file_that_names_no_other_address(url):
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "http:" not in answer.text
    assert "https:" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert httpx.get(url).headers["content-security-policy"] != policy


def shows_what_is_held(page, url):
    """Wait until the page has a dot for each unit that a host says it holds; returns how many."""

    def held():
        answer = httpx.get(f"{url}/experts", headers={"Authorization": "Bearer secret"}, timeout=20)
        return sum(layer.count("1") for host in answer.json()["hosts"] for layer in host["units"])

    wait_for(lambda: page.wait_for_timeout(100) or 0 < held() == page.locator("#units .dot").count(), 20, "the dots")
    return held()


def ask_over_grpc(target, token, prompt):
    """A text of six tokens; returns how many the prompt has, and the path of each of these by layers."""
    with Client(target, token=token, timeout_s=60, retry_s=0) as client:
        told = client.complete(prompt, 6, ignore_eos=True)
        paths = client.route(prompt).paths
    assert told.prompt_tokens == len(paths)
    return len(paths), [[list(ids) for ids in of_layer] for of_layer in zip(*paths, strict=True)]


#: Of the first of the last requests, the expert ids in each layer of each token.
DRAWN = """() => [...document.querySelectorAll("#last > div:first-child tr")].slice(1).map(
    tr => [...tr.querySelectorAll("td")].map(td => [...td.querySelectorAll(".unit")].map(e => +e.textContent)))"""


def shows_requests_of_others(page, doors):
    """Ask over gRPC and HTTP beside the page, with its key and with another; wait for what it shows."""
    url, target = doors
    num, of_layers = ask_over_grpc(target, "secret", "The harbour lay still")
    ask_over_grpc(target, "other", "Nobody else is to see this")
    page.get_by_text(f"{num} tokens of prompt, 6 generated").wait_for(timeout=20_000)
    drawn = page.evaluate(DRAWN)
    assert [layer[:num] for layer in drawn] == of_layers
    assert {len(layer) for layer in drawn} == {num + 5}, "the last one was not computed"
    body = {"prompt": "A cat", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    key = {"Authorization": "Bearer secret"}
    usage = httpx.post(f"{url}/v1/completions", json=body, headers=key, timeout=60).json()["usage"]
    page.get_by_text(f"{usage['prompt_tokens']} tokens of prompt, 3 generated").wait_for(timeout=20_000)
    assert page.locator("#last > div").count() == 2
    told = httpx.get(f"{url}/paths", headers=key, timeout=20).json()["requests"]
    assert [request["completion_tokens"] for request in told] == [3, 6]
    assert httpx.get(f"{url}/paths", timeout=20).status_code == 401


def test_in_a_browser(doors, url, hosts, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1300})
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.get_by_text("this server asks for an API key").wait_for(timeout=20_000)
        page.fill("#key", "secret")
        page.get_by_role("heading", name="quartet").wait_for(timeout=20_000)
        assert page.locator("#hosts tr").count() == 1 + 2
        homes = page.locator("#units .unit").count()
        assert 4 < homes == shows_what_is_held(page, url) + page.locator("#units .away").count()
        assert page.locator("#last .unit").count() == 0
        shows_requests_of_others(page, doors)
        page.fill("#prompt", HOSTILE)
        page.fill("#most", "12")
        page.click("#go")
        page.get_by_text("first text after").wait_for(timeout=30_000)
        page.locator("#paths .unit").first.wait_for(timeout=20_000)
        assert page.locator("#text").inner_text().strip()
        assert page.locator("img").count() == 0
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=str(tmp_path / "dark.png"))
        hosts.kill(1)
        page.get_by_text("serving; 1 host(s) lost").wait_for(timeout=30_000)
        page.click("#go")
        page.get_by_text("first text after").wait_for(timeout=30_000)
        assert shows_what_is_held(page, url) <= page.locator("[title*='in memory of host 0']").count()
        assert page.locator("[title*='in memory of host 1']").count() == 0
        page.emulate_media(color_scheme="light")
        page.screenshot(path=str(tmp_path / "lost.png"), full_page=True)
        assert page.title() == "pregate"
        assert not wrong
        browser.close()

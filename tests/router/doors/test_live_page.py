"""The live page in a real browser: what lives where, a prompt's text and path, and nothing that it shows is run."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from pregate.router.doors.access import TokenFile
from pregate.router.doors.openai_app import build_app
from pregate.router.doors.service import DoorService
from pregate.router.link.client import EngineClient
from tests.router.doors.test_openai_app import HttpServer
from tests.router.running import engine_thread, socket_folder
from tests.router.serving import engine_in_process

SHIPPED = Path(__file__).resolve().parents[3] / "examples" / "quartet-paths"
HOSTILE = "<img src=x onerror=document.title='run'> It was a cold evening"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text("secret\n")
    with ExitStack() as stack:
        engine = stack.enter_context(engine_in_process(SHIPPED, 2))
        endpoint = f"ipc://{stack.enter_context(socket_folder())}/engine.sock"
        stack.enter_context(engine_thread(engine, endpoint))
        server = HttpServer(
            build_app(DoorService(EngineClient(endpoint), SHIPPED, "quartet"), tokens=TokenFile(tokens))
        )
        yield server.url
        server.close()


def test_it_is_one_file_that_names_no_other_address(url):
    answer = httpx.get(url)
    assert answer.status_code == 200
    assert "http:" not in answer.text
    assert "https:" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy
    assert httpx.get(url).headers["content-security-policy"] != policy


def test_in_a_browser(url, tmp_path):
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
        assert page.locator("#units .unit").count() > 4
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
        assert page.title() == "pregate"
        assert not wrong
        browser.close()

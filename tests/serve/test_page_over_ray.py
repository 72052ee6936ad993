"""The page of the real server: `serve/app.py` with a small model, in a real browser."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serve.test_faults import Server, started

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright.sync_api import Browser, expect  # noqa: E402

from tests.serve.test_page import CHROMIUM, browser, story, write  # noqa: E402

__all__ = ["browser"]  # the fixture
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
]
WITHIN_MS = 60_000
PROMPT = "The cat"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("page"), "--replicas 1 --rows 2") as server:
        yield server


def test_a_story_is_written_named_and_coloured(server: Server, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(WITHIN_MS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.get_by_label("The story begins").fill(PROMPT)
    page.get_by_label("Length").fill("200")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Colour tokens").check()
    page.evaluate(
        "new MutationObserver(() => (window.seen = (window.seen || new Set()).add("
        "document.querySelector('article .text')?.textContent.length)))"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    write(page)
    expect(page.locator(".facts")).to_contain_text("200 tokens · ", timeout=WITHIN_MS)
    pieces = page.evaluate("window.seen.size")
    body = {"prompt": PROMPT, "max_tokens": 200, "seed": 7}  # the page's other settings are the defaults
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert pieces > 5  # it grew while it was written
    assert story(page).evaluate("e => e.textContent") == answer["story"]
    lineage = page.locator("article .lineage")
    expect(lineage).to_contain_text("tiny 1")
    expect(lineage).to_contain_text(answer["model"]["data_fingerprint"][:12])
    tokens = page.locator("article [data-chance]")
    assert tokens.count() > 100  # parts of one character share a span
    tokens.nth(3).hover()
    expect(page.locator("#chances")).to_be_visible()
    expect(page.locator("#chances")).to_contain_text("%")
    context.close()
    assert faults == []

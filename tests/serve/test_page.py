"""The page in a real browser: Debian's Chromium without a window, against a small server that speaks the contract."""

import os
import shutil
import time
from collections.abc import Callable, Iterator

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

from tests.support.page_server import WORDS, PageServer  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
PROMPT = "Once upon a time there was a little girl called"
STORY = f"{PROMPT} {' '.join(WORDS)}"
WITHIN_S = 10


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as engine:
        # Chromium refuses its sandbox to root, as in a container; anyone else keeps it.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running() -> Iterator[PageServer]:
    server = PageServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(running: PageServer) -> PageServer:
    running.reset()
    return running


@pytest.fixture
def page(browser: Browser, server: PageServer) -> Iterator[Page]:
    """The page, opened; no test may make it ask another origin, break its content policy or throw."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(WITHIN_S * 1000)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    page.goto(server.url)
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
    assert faults == []


def write(page: Page) -> None:
    page.get_by_role("button", name="Write").click()


def story(page: Page, number: int = 0) -> Locator:
    return page.locator("article .text").nth(number)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- writing


def test_story_grows_while_it_is_written_and_ends_with_its_speed_and_lineage(page: Page, server: PageServer) -> None:
    server.script.allowed = 3
    write(page)
    expect(story(page)).to_have_text(f"{PROMPT} {' '.join(WORDS[:3])}")
    expect(page.get_by_role("button", name="Stop").first).to_be_visible()
    server.script.allowed = 5
    expect(story(page)).to_have_text(f"{PROMPT} {' '.join(WORDS[:5])}")
    server.script.allowed = 10**9
    expect(story(page)).to_have_text(STORY)
    expect(page.locator(".facts")).to_contain_text(f"{len(WORDS)} tokens · ")
    expect(page.locator(".facts")).to_contain_text("tokens/s · cut at its length · seed ")
    expect(page.locator("article .lineage")).to_have_text(
        "Modeltinystories 3Run8d1f0c2ab7e9Step12,000Data setfafafafafafa"
    )
    expect(page.locator("#stop")).to_be_hidden()


def test_settings_are_sent_as_typed(page: Page, server: PageServer) -> None:
    sent = {
        "temperature": 0.35,
        "top_k": 7,
        "top_p": 0.9,
        "repetition_penalty": 1.15,
        "max_tokens": 33,
        "seed": 42,
    }
    labels = ("Temperature", "Top-k", "Top-p", "Repetition penalty", "Length", "Seed")
    for label, value in zip(labels, sent.values(), strict=True):
        page.get_by_label(label).fill(str(value))
    page.get_by_label("The story begins").fill("The cat")
    write(page)
    expect(page.locator(".facts")).to_contain_text("seed 42")
    assert server.requests == [{"prompt": "The cat", "stream": True} | sent]


def test_setting_out_of_range_is_not_sent(page: Page, server: PageServer) -> None:
    page.get_by_label("Top-p").fill("1.5")
    write(page)
    assert page.evaluate("document.getElementById('top_p').validity.rangeOverflow")
    assert page.locator("article").count() == 0
    assert server.requests == []


def test_stop_closes_the_connection_and_continue_writes_on(page: Page, server: PageServer) -> None:
    server.script.allowed = 2
    write(page)
    so_far = f"{PROMPT} {' '.join(WORDS[:2])}"
    expect(story(page)).to_have_text(so_far)
    page.locator("#stop").click()
    wait_until(lambda: server.closed_early == 1)
    expect(page.locator(".facts")).to_contain_text("2 tokens · ")
    expect(page.locator(".facts")).to_contain_text("stopped")
    server.script.allowed = 10**9
    page.get_by_role("button", name="Continue").click()
    expect(story(page)).to_have_text(f"{so_far} {' '.join(WORDS)}")
    assert server.requests[1]["prompt"] == so_far


def test_story_longer_than_the_context_is_continued_from_its_end(page: Page, server: PageServer) -> None:
    write(page)
    expect(story(page)).to_have_text(STORY)
    server.script.context_words = 12
    page.get_by_role("button", name="Continue").click()
    expect(story(page)).to_have_text(f"{STORY} {' '.join(WORDS)}")
    whole, *_, last = [request["prompt"] for request in server.requests[1:]]
    assert whole == STORY
    assert 5 < len(last.split()) <= 12
    assert STORY.endswith(" " + last)


def test_words_to_use_are_asked_for_where_the_model_learned_instructions(page: Page, server: PageServer) -> None:
    expect(page.get_by_text("About the model")).to_be_visible()
    expect(page.get_by_label("With these words")).to_be_hidden()
    server.script.has_instructions = True
    page.reload()
    page.get_by_label("With these words").fill(" share,kite , red ball,,")
    write(page)
    expect(story(page)).to_have_text(STORY)
    page.get_by_label("With these words").fill("")
    write(page)
    wait_until(lambda: len(server.requests) == 2)
    assert [request["words"] for request in server.requests] == [["share", "kite", "red ball"], []]
    assert {request["prompt"] for request in server.requests} == {PROMPT}


def test_variants_stand_side_by_side_with_a_seed_each(page: Page, server: PageServer) -> None:
    page.get_by_label("Variants").select_option("4")
    page.get_by_label("Seed").fill("10")
    server.script.allowed = 2
    write(page)
    for number in range(4):
        expect(story(page, number)).to_have_text(f"{PROMPT} {' '.join(WORDS[:2])}")
    boxes = [box for one in page.locator("article").all() if (box := one.bounding_box())]
    assert len({box["y"] for box in boxes}) == 1
    assert len({box["x"] for box in boxes}) == 4
    assert sorted(request["seed"] for request in server.requests) == [10, 11, 12, 13]
    page.get_by_role("article", name="Story 2").get_by_role("button", name="Stop").click()
    wait_until(lambda: server.closed_early == 1)
    server.script.allowed = 10**9
    expect(story(page, 3)).to_have_text(STORY)
    expect(story(page, 1)).to_have_text(f"{PROMPT} {' '.join(WORDS[:2])}")


def test_writing_anew_leaves_the_story_before(page: Page, server: PageServer) -> None:
    server.script.allowed = 1
    write(page)
    expect(story(page)).to_have_text(f"{PROMPT} {WORDS[0]}")
    write(page)
    wait_until(lambda: server.closed_early == 1)
    server.script.allowed = 10**9
    expect(story(page)).to_have_text(STORY)
    assert page.locator("article").count() == 1


def test_text_of_the_model_is_never_markup(page: Page, server: PageServer) -> None:
    evil = [
        " <img src=x onerror=\"document.title='broken'\">",
        "<script>document.title='broken'</script>",
        " </p>&amp;",
    ]
    server.script.words = evil
    page.get_by_label("Colour tokens").check()
    page.get_by_label("The story begins").fill("<b>Once</b>")
    write(page)
    expect(story(page)).to_have_text("<b>Once</b>" + "".join(evil))
    page.locator(".token").first.hover()
    expect(page.locator("#chances")).to_contain_text("<i>cat</i>")
    assert page.locator("article img, article script, article b, #chances i").count() == 0
    assert page.title() == "Once upon a time"


# ---- errors in words


def test_server_gone_before_a_story(browser: Browser) -> None:
    server = PageServer()
    server.start()
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        server.stop()
        write(page)
        expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")
        expect(page.get_by_role("button", name="Try again")).to_be_enabled()


def test_server_gone_in_the_middle_keeps_what_was_written(page: Page, server: PageServer) -> None:
    server.script.allowed = 4
    write(page)
    expect(story(page)).to_have_text(f"{PROMPT} {' '.join(WORDS[:4])}")  # a reset takes along what is on its way
    server.script.dies_after, server.script.allowed = 4, 10**9
    expect(page.get_by_role("alert")).to_contain_text("The connection was lost in the middle of the story.")
    expect(story(page)).to_have_text(f"{PROMPT} {' '.join(WORDS[:4])}")
    server.script.dies_after = None
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator(".facts")).to_contain_text("cut at its length")


def test_error_event_is_shown(page: Page, server: PageServer) -> None:
    server.script.fails_after = 2
    write(page)
    expect(page.get_by_role("alert")).to_have_text("The model failed.")
    expect(story(page)).to_have_text(f"{PROMPT} {' '.join(WORDS[:2])}")


@pytest.mark.parametrize(
    "status, body, headers, words",
    [
        (422, {"detail": "prompt: too odd"}, {}, "Prompt: too odd."),
        (
            429,
            {"detail": "8 stories wait"},
            {"Retry-After": "7"},
            "The server is busy: try again in 7 seconds. (8 stories wait)",
        ),
        (503, ["no detail"], {}, "The server answered 503."),
    ],
)
def test_error_answer_is_shown_and_can_be_tried_again(
    page: Page, server: PageServer, status: int, body: object, headers: dict[str, str], words: str
) -> None:
    server.script.refusal = (status, body, headers)
    write(page)
    expect(page.get_by_role("alert")).to_have_text(words)
    server.script.refusal = None
    page.get_by_role("button", name="Try again").click()
    expect(story(page)).to_have_text(STORY)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_key_is_asked_for_when_the_server_wants_one_and_kept_in_the_tab(page: Page, server: PageServer) -> None:
    expect(page.get_by_text("About the model")).to_be_visible()
    expect(page.get_by_label("API key")).to_be_hidden()
    server.script.key = "a-secret-key"
    write(page)
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    wait_until(lambda: len(server.requests) == 2)
    expect(page.get_by_label("API key")).to_be_visible()  # a field that was just hidden may count as focused
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("a-secret-key")
    page.keyboard.press("Enter")
    expect(story(page)).to_have_text(STORY)  # what was refused is done again by itself
    expect(page.get_by_label("API key")).to_be_hidden()
    page.reload()
    write(page)
    expect(story(page)).to_have_text(STORY)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_story_that_is_refused_after_the_next_key_was_given_is_asked_for_with_that_key(
    page: Page, server: PageServer
) -> None:
    server.script.key = "a-secret-key"
    server.script.refuses_after_s = 1.0  # GET /model is refused at once, and asks for the key
    page.reload()
    expect(page.get_by_label("API key")).to_be_focused()
    write(page)
    wait_until(lambda: len(server.requests) == 1)
    page.get_by_label("API key").fill("a-secret-key")
    page.keyboard.press("Enter")
    expect(story(page)).to_have_text(STORY)
    expect(page.get_by_label("API key")).to_be_hidden()
    assert len(server.requests) == 2


# ---- probabilities


def test_tokens_are_coloured_and_show_their_alternatives_on_hover_and_focus(page: Page, server: PageServer) -> None:
    page.get_by_label("Colour tokens").check()
    write(page)
    expect(page.locator(".facts")).to_contain_text("cut at its length")
    assert server.requests[0]["logprobs"] == 5
    tokens = page.locator(".token")
    assert [tokens.nth(i).get_attribute("data-chance") for i in range(5)] == ["0", "1", "2", "3", "4"]
    assert len({colour(tokens.nth(i), "backgroundColor") for i in range(5)}) == 5
    tokens.nth(1).hover()
    rows = page.get_by_role("tooltip").locator("li")
    expect(rows).to_have_text(["␣<i>cat</i>50 %", "⏎5.0 %", f"␣{WORDS[1]}41 % ✓"])
    page.mouse.move(0, 0)
    expect(page.locator("#chances")).to_be_hidden()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(rows.last).to_have_text(f"␣{WORDS[1]}41 % ✓")
    expect(tokens.nth(1)).to_have_attribute("aria-describedby", "chances")
    page.keyboard.press("Escape")
    expect(page.locator("#chances")).to_be_hidden()
    page.get_by_label("Colour tokens").uncheck()
    assert len({colour(tokens.nth(i), "backgroundColor") for i in range(5)}) == 1


def test_characters_of_several_tokens_and_text_that_was_held_back_find_their_tokens(page: Page) -> None:
    matched = page.evaluate(
        """() => {
            const pending = [{text: "\\ufffd"}, {text: "\\ufffd"}], found = [];
            const take = text => found.push(...[...match(text, pending)].map(u => [u.text, u.tokens.length]));
            take("🦊"); pending.push({text: " then"}, {text: " the"}); take(" th"); take("en the"); take("!");
            return [found, pending.length];
        }"""
    )
    assert matched == [[["🦊", 2], [" th", 1], ["en", 1], [" the", 1], ["!", 0]], 0]


# ---- everybody


def test_keyboard_alone_writes_stops_and_continues(page: Page, server: PageServer) -> None:
    expect(page.get_by_label("The story begins")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("The dog")
    server.script.allowed = 1
    page.keyboard.press("Control+Enter")
    expect(story(page)).to_have_text(f"The dog {WORDS[0]}")
    page.keyboard.press("Escape")
    wait_until(lambda: server.closed_early == 1)
    server.script.allowed = 10**9
    reached = []
    while "Continue" not in reached:
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert len(reached) < 15
    assert reached[:3] == ["temperature", "top_k", "top_p"]
    page.keyboard.press("Enter")
    expect(story(page)).to_have_text(f"The dog {WORDS[0]} {' '.join(WORDS)}")
    assert [request["prompt"] for request in server.requests] == ["The dog", f"The dog {WORDS[0]}"]


def test_focus_is_not_lost_when_the_stop_button_goes(page: Page, server: PageServer) -> None:
    server.script.allowed = 1
    write(page)
    page.locator("#stop").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Write")).to_be_focused()


def test_screen_reader_hears_two_sentences_and_no_tokens(page: Page, server: PageServer) -> None:
    page.evaluate(
        """() => { window.heard = [];
            new MutationObserver(() => heard.push(document.getElementById("status").textContent))
                   .observe(document.getElementById("status"), {childList: true}); }"""
    )
    write(page)
    expect(page.locator("#status")).to_contain_text(f"The story: {len(WORDS)} tokens")
    assert len(page.evaluate("heard")) == 2
    assert page.locator("article [aria-live], article [role=status], article[aria-live]").count() == 0


def test_narrow_phone_has_one_column_and_nothing_to_scroll_sideways(page: Page, server: PageServer) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    server.script.words = [" Lily", " " + "a" * 200, " and", " Tom", " went"]
    page.get_by_label("Variants").select_option("3")
    page.get_by_label("Colour tokens").check()
    write(page)
    expect(page.locator(".facts").nth(2)).to_contain_text("cut at its length")
    page.get_by_text("About the model").click()
    page.evaluate("askForKey()")
    for i in range(5):
        page.locator(".token").nth(i).focus()
        box = page.locator("#chances").bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert len({(box or {})["x"] for box in (one.bounding_box() for one in page.locator("article").all())}) == 1


def test_everything_stands_in_one_column_on_a_wide_window(page: Page) -> None:
    page.get_by_label("Colour tokens by probability").check()
    expect(page.locator("#legend")).to_be_visible()
    lefts = page.eval_on_selector_all(
        "main > :not([hidden]):not(.spoken)", "all => all.map(one => Math.round(one.getBoundingClientRect().left))"
    )
    assert len(lefts) > 3
    assert set(lefts) == {(1200 - 44 * 16) / 2}


def test_reduced_motion_stills_everything(page: Page, server: PageServer) -> None:
    page.emulate_media(reduced_motion="reduce")
    server.script.allowed = 2
    write(page)
    expect(page.locator(".piece")).to_have_count(2)
    assert page.evaluate("document.getAnimations().length") == 0


# ---- contrast


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_have_the_contrast_of_wcag_aa(page: Page, server: PageServer, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    server.script.fails_after = 5
    page.get_by_label("Colour tokens").check()
    write(page)
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_text("About the model").click()
    page.evaluate("askForKey()")
    page.locator(".token").first.focus()
    texts = "h1, h2, label, .hint, .legend span, .prompt, .token, .problem, .facts, dt, dd, summary"
    texts += ", button, input, textarea, select"
    shown = [one for one in page.locator(f":is({texts}, #chances li span, .key p)").all() if one.is_visible()]
    assert len(shown) > 40
    for one in shown:
        assert contrast(colour(one, "color"), background(one)) >= 4.5, one.evaluate("e => e.outerHTML.slice(0, 90)")
    controls = page.locator("textarea, input:not([type=checkbox]), select, button:not(.primary)")
    for one in (one for one in controls.all() if one.is_visible()):
        assert contrast(colour(one, "borderTopColor"), parent_background(one)) >= 3
    page.get_by_label("Temperature").focus()
    ring = colour(page.get_by_label("Temperature"), "outlineColor")
    assert contrast(ring, parent_background(page.get_by_label("Temperature"))) >= 3
    is_dark = luminance(background(page.locator("main"))) < 0.05
    assert is_dark == (scheme == "dark")


def colour(one: Locator, kind: str) -> str:
    """A computed colour, as rgb(r, g, b)."""
    value: str = one.evaluate("(e, kind) => getComputedStyle(e)[kind]", kind)
    return value


_BEHIND = """e => {
    while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
    return getComputedStyle(e).backgroundColor;
}"""


def background(one: Locator) -> str:
    """The colour behind an element's text: its own, or the nearest one around it."""
    value: str = one.evaluate(_BEHIND)
    return value


def parent_background(one: Locator) -> str:
    """The colour around an element."""
    value: str = one.evaluate(f"e => ({_BEHIND})(e.parentElement)")
    return value


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio": 1 to 21."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """WCAG 2.2, "relative luminance", of a colour without transparency written as rgb(r, g, b)."""
    assert colour.startswith("rgb("), colour
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue

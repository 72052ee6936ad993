"""The site of the documentation: built without a warning, with every page in it, and nothing from another host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from infra.docs.hooks import github_anchor, on_page_markdown, outside_code, shown, sources, target
from tests.support.pages import PAGES
from tests.support.paths import ROOT

pytest.importorskip("mkdocs")
CONFIG = ROOT / "infra" / "docs" / "mkdocs.yml"


class Article(HTMLParser):
    """Texts outside of code, and what a browser fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = list[str]()
        self.texts = list[str]()
        self.fetched = list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("img", "script", "iframe") or (tag == "link" and values.get("rel") != "canonical"):
            self.fetched.append(values.get("src") or values.get("href") or "")
        if tag not in ("br", "hr", "img", "input", "link", "meta", "path", "source", "wbr"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "article" in self.stack and not {"code", "pre", "script", "style"} & set(self.stack):
            self.texts.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def parsed(page: Path) -> Article:
    article = Article()
    article.feed(page.read_text(encoding="utf-8"))
    return article


def test_every_page_of_the_checkout_is_one_of_the_site(site: Path) -> None:
    titles = set()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        titles |= set(re.findall(r"<h1[^>]*>(.*?)<a class=\"headerlink\"", text, re.DOTALL))
    plain = {re.sub(r"<[^>]+>", "", title).strip() for title in titles}
    wanted = {page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in PAGES}
    assert wanted - plain == set()
    assert len(PAGES) > 20


def test_a_reader_s_browser_asks_no_other_host(site: Path) -> None:
    fetched = {(page.name, one) for page in site.rglob("*.html") for one in parsed(page).fetched}
    assert len(fetched) > 100
    assert {one for one in fetched if re.match(r"(https?:)?//", one[1])} == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", styles) == []


def test_no_markdown_is_left_in_the_text(site: Path) -> None:
    left = re.compile(r"\*\*|\]\(|^\s*[-*] |\|---|\\\||```", re.MULTILINE)
    pages = [page for page in site.rglob("*.html") if "reference" not in page.parts]  # `2**63` in docstrings
    assert [(page.name, text) for page in pages for text in parsed(page).texts if left.search(text)] == []


def test_rooms_have_their_names_and_docstrings(site: Path) -> None:
    for room in ("generation", "training"):
        text = (site / "reference" / f"{room}.html").read_text(encoding="utf-8")
        assert 'id="slm_ray.' in text and "<h1" in text
    engine = (site / "reference" / "generation.html").read_text(encoding="utf-8")
    assert 'id="slm_ray.generation.engine.Engine.generate"' in engine


def test_links_lead_where_they_lead_in_the_checkout() -> None:
    assert target("infra/k8s/README.md", "../README.md") == "infra/README.md"
    assert "LICENSE" in sources("infra/LICENCES.md")
    assert sources("reference/model.md") == []
    assert shown("CITATION.cff").startswith("# `CITATION.cff`\n\n````yaml\ncff-version")


def test_code_in_fences_stays_and_a_bar_in_a_table_is_a_bar() -> None:
    class File:
        src_uri = "infra/LICENCES.md"

    class Page:
        file = File()

    text = "[it](../LICENSE)\n| `a \\| b` | [x](PLATFORMS.md) |\n```\n[it](../LICENSE) `\\|`\n```\n"
    changed = on_page_markdown(text, Page())  # type: ignore[arg-type]
    assert changed == "[it](../LICENSE.md)\n| `a | b` | [x](PLATFORMS.md) |\n```\n[it](../LICENSE) `\\|`\n```\n"
    assert outside_code("a\n```\na\n```\na", str.upper) == "A\n```\na\n```\nA"


@pytest.mark.parametrize(
    ("title", "anchor"),
    [("From nothing to your own corpus", "from-nothing-to-your-own-corpus"), ("`a`, then b - c", "a-then-b---c")],
)
def test_anchors_are_those_of_github(title: str, anchor: str) -> None:
    assert github_anchor(title) == anchor

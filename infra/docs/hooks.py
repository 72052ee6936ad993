"""What mkdocs is told beyond its configuration: which files are pages, and where their links lead.

In: `nav` of mkdocs.yml, whose paths are those of the checkout. Out: a page for each of them, so that a link which leads
somewhere in the checkout leads there in the site; a page for each file of code or text that they link to; and a page of
names for each room of the core. No text is copied: what a page says stands in one file.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
SHORTER = ((".github/", ""), ("infra/docs/", ""))
"""Folders that an address does not show: servers of static sites hide those with a dot."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")
ROW, CODE = re.compile(r"^\|.*$", re.MULTILINE), re.compile(r"`[^`]+`")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".cff": "yaml", ".yaml": "yaml", ".yml": "yaml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as GitHub makes them, and the rooms at the end of the navigation."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": github_anchor}
    config.nav.append({"Modules": [{room: f"reference/{room}.md"} for room in rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's own files, and the pages."""
    paths = [path for path in named(config.nav) if not path.startswith("reference/")]
    pages = [_page(config, path, abs_src_path=str(ROOT / path)) for path in paths]
    linked = sorted({target for path in paths for target in sources(path)})
    pages += [_page(config, f"{path}.md", content=shown(path)) for path in linked]
    pages += [_page(config, f"reference/{room}.md", content=reference(room)) for room in rooms()]
    return Files([file for file in files if not file.is_documentation_page()] + pages)


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files that are no pages lead to the pages that show them; in code in a table, `\\|` is a `|`."""
    name, wanted = page.file.src_uri, set(sources(page.file.src_uri))

    def mended(text: str) -> str:
        text = LINK.sub(lambda link: f"{link[1]}.md" if target(name, link[1]) in wanted else link[1], text)
        return ROW.sub(lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), text)

    return outside_code(markdown, mended)


def github_anchor(title: str, _separator: str = "-") -> str:
    """The name of a heading, as GitHub makes it: of `From "a", then b` it is `from-a-then-b`."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def named(nav: Any) -> Iterator[str]:
    """The paths in a navigation, in its order."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from named(part)
    elif isinstance(nav, Sequence):
        for part in nav:
            yield from named(part)


def target(page: str, link: str) -> str:
    """What a relative link of a page leads to, from the checkout's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def outside_code(markdown: str, change: Any) -> str:
    """Change what stands outside of fenced code."""
    return "".join(part if part.startswith("```") else change(part) for part in FENCE.split(markdown))


def sources(page: str) -> list[str]:
    """Files of the checkout that a page links to and that are no Markdown."""
    if not (ROOT / page).is_file():
        return []
    text = "".join(FENCE.split((ROOT / page).read_text(encoding="utf-8"))[::2])
    found = [target(page, link) for link in LINK.findall(text) if "://" not in link and not link.endswith(".md")]
    return [path for path in found if (ROOT / path).is_file()]


def shown(path: str) -> str:
    """A page that shows a file of code or text."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    return f"# `{path}`\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"


def rooms() -> list[str]:
    """The rooms of the core, by name."""
    return sorted(path.parent.name for path in (ROOT / "slm_ray").glob("*/__init__.py"))


def reference(room: str) -> str:
    """A page of what a room's modules have for others, by their docstrings."""
    return f"# slm_ray.{room}\n\n::: slm_ray.{room}\n"


def _page(config: MkDocsConfig, path: str, **content: str) -> File:
    file = File.generated(config, path, inclusion=InclusionLevel.INCLUDED, **content)
    for folder, shorter in SHORTER:
        if file.dest_uri.startswith(folder):
            file.dest_uri = shorter + file.dest_uri.removeprefix(folder)
    return file

"""The READMEs and their neighbours: links lead somewhere, and what they name is there."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.project.test_architecture import FLOORS
from tests.support.pages import PAGES
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_of_the_checkout_is_looked_at() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert set(listed.stdout.split()) <= {page.relative_to(ROOT).as_posix() for page in PAGES}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_commands_and_paths_name_files_that_exist(page: Path) -> None:
    named = re.findall(r"\b(?:pipelines|serve|slm_ray|tune|infra|tests)/[\w/-]+\.\w+", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


@pages
def test_a_folder_s_table_names_its_files(page: Path) -> None:
    cells = [line.split("|")[1] for line in without_code(page).splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall(r"`([\w/]+(?:\.py|/))`", cell)]
    assert [name for name in named if not (page.parent / name).exists()] == []


def test_the_main_page_stays_short() -> None:
    assert len(README.splitlines()) <= 300


def test_the_tree_names_every_room_and_nothing_that_is_not_there() -> None:
    named, folder = set(), ""
    for line in README.split("## What lies where\n")[1].split("```")[1].strip().splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else name
        named.add(ROOT / folder / name if line.startswith(" ") else ROOT / name)
    assert [path for path in named if not path.exists()] == []
    code = ("pipelines", "serve", "slm_ray", "tune")
    rooms = {path.parent for top in code for path in (ROOT / top).glob("*/*.*") if path.parent.name != "__pycache__"}
    assert rooms - named == set()


def test_contributing_draws_the_floors_that_the_tests_hold() -> None:
    rows = re.findall(r"^\| \d \| ([\w, ]+) \|", (ROOT / ".github/CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert [set(row.split(", ")) for row in rows] == FLOORS

"""What `uv sync` would install, read from pyproject.toml (uv itself is not run here), and how the work is cited."""

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]


def extras_of(requirement: str) -> set[str]:
    """The extras of this project that a requirement names, and those that they name in turn."""
    match = re.fullmatch(r"slm-ray\[([\w,]+)\]", requirement)
    named = set(match[1].split(",")) if match else set()
    return named.union(*(extras_of(inner) for name in named for inner in EXTRAS[name]))


def test_plain_uv_sync_installs_what_the_four_commands_need() -> None:
    default = PROJECT["tool"]["uv"]["default-groups"]
    assert set(default) <= set(GROUPS)
    installed = {extra for group in default for requirement in GROUPS[group] for extra in extras_of(requirement)}
    assert {"prepare", "train", "serve"} <= installed
    assert "dev" not in installed
    assert PROJECT["tool"]["uv"].get("package", True) and "build-system" in PROJECT, "slm_ray itself is installed too"


def test_the_group_dev_is_what_make_setup_installs() -> None:
    assert ".[all]" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert GROUPS["dev"] == ["slm-ray[all]"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_names_extras_that_exist(group: str) -> None:
    for requirement in GROUPS[group]:
        assert extras_of(requirement), requirement


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation), "what the format asks for"
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    released = re.findall(
        r"^## \[([\d.]+)\] - ([\d-]+)", (ROOT / "infra/CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    assert (citation["version"], str(citation["date-released"])) == released[0]

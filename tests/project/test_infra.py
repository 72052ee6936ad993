"""YAML, hooks and workflow: clean, pinned, and saying the same."""

import re
import subprocess
import sys
import tomllib
from typing import Any

import yaml

from tests.support.paths import ROOT

INFRA = ROOT / "infra"
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
YAML_FILES = [*sorted(INFRA.rglob("*.y*ml")), *WORKFLOWS, HOOKS, ROOT / ".yamllint"]


def test_yaml_is_clean() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", *YAML_FILES], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


def fetched_hooks() -> list[dict[str, Any]]:
    """The repositories that pre-commit fetches; the local one has no version."""
    return [repo for repo in yaml.safe_load(HOOKS.read_text())["repos"] if repo["repo"] != "local"]


def test_hooks_are_pinned_to_the_versions_that_were_tested() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    packages = {repo["repo"].rsplit("/", 1)[1].replace("-", "_"): repo["rev"] for repo in fetched_hooks()}
    assert packages == {name: f"v{pins[name]}" for name in ("pre_commit_hooks", "codespell")}


def test_make_lint_checks_what_the_hooks_check() -> None:
    recipe = (ROOT / "Makefile").read_text()
    hooks = {hook["id"] for repo in fetched_hooks() for hook in repo["hooks"]}
    yaml_is_linted = {"check-yaml"}  # yamllint parses the files too
    assert {hook for hook in hooks - yaml_is_linted if not re.search(rf"\b{hook}(-fixer)?\b", recipe)} == set()


def test_hooks_check_the_types_of_what_mypy_checks() -> None:
    [mypy] = [h for r in yaml.safe_load(HOOKS.read_text())["repos"] for h in r["hooks"] if h["id"] == "mypy"]
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert all(re.match(mypy["files"], f"{folder}/module.py") for folder in folders)
    assert not re.match(mypy["files"], "tests/module.py")


def test_ci_runs_our_script_with_pinned_actions() -> None:
    [workflow] = [yaml.safe_load(path.read_text()) for path in WORKFLOWS]
    [job] = workflow["jobs"].values()
    assert job["timeout-minutes"] == 90
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)

"""`infra/SEEDS.md`: every line of the seeds is a row; every command of a row has its script, options and presets."""

import contextlib
import importlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from pipelines import options
from slm_ray import train
from tests.support.pages import commands
from tests.support.paths import ROOT
from tune import sweep

PAGE = ROOT / "infra" / "SEEDS.md"
SEEDS = ROOT.parent / "shared" / "seeds.md"
COMMANDS = {
    "pipelines/prepare.py": "pipelines.prepare",
    "slm_ray/train.py": "slm_ray.train",
    "slm_ray/generate.py": "slm_ray.generate",
    "slm_ray/evaluate.py": "slm_ray.evaluate",
    "slm_ray/export.py": "slm_ray.export",
    "tune/sweep.py": "tune.sweep",
    "serve/app.py": "serve.app",
    "infra/check_endpoint.py": "infra.check_endpoint",
}
BEAMS_OWN = {"--runner"}


def rows(page: Path) -> list[list[str]]:
    """The cells of each row of the page's tables, without heads and rules."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if re.match(r"\| (?!Line \|)", line)]
    return [[cell.strip() for cell in re.split(r" \| ", line.strip("| "), maxsplit=2)] for line in lines]


def spans(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text.replace(r"\|", "|"))


@cache
def known_options(script: str) -> str:
    """What the script's own parser says of itself."""
    shown = io.StringIO()
    main = importlib.import_module(COMMANDS[script]).main
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        main(["--help"])
    return shown.getvalue()


def is_known(script: str, option: str) -> bool:
    """Whether the help has the option as a word of its own."""
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w.-])", known_options(script)) is not None


def options_of(text: str) -> list[tuple[str, str]]:
    """Each option in the code of a cell, with the script before it."""
    found, script = list[tuple[str, str]](), ""
    for span in spans(text):
        words = span.split()
        if words[0] == "python":
            script = "" if words[1] == "-m" else words[1]
        elif not words[0].startswith("--"):
            script = ""
        found += [(script, word) for word in words if script and re.match(r"--[a-z]", word)]
    return found


TABLE = rows(PAGE)
OF_CONTAINERS = {command.text for page in ("", "k8s/") for command in commands(ROOT / f"infra/{page}README.md")} | {
    "docker build -f infra/Dockerfile .",
    "kubectl -n slm-ray get pods",
    "kubectl apply -k infra/k8s/plain",
    "kubectl apply -k infra/k8s/overlays/gke",
}


@pytest.mark.skipif(not SEEDS.exists(), reason="no ../shared/seeds.md: the seeds' own list is not here")
def test_every_line_of_the_seeds_is_a_row() -> None:
    def plain(cells: list[str]) -> tuple[str, ...]:
        return tuple(cell.replace("**", "").replace("\\", "") for cell in cells[:2])

    assert [plain(cells) for cells in TABLE] == [plain(cells) for cells in rows(SEEDS)]


@pytest.mark.parametrize("cells", TABLE, ids=[f"{number} {cells[0]}" for number, cells in enumerate(TABLE)])
def test_a_row_says_what_to_do(cells: list[str]) -> None:
    here = cells[2]
    assert spans(here) or "](" in here or "not there" in here or "constraints.txt" in here or "none are needed" in here
    for span in spans(here):
        words = span.split()
        if words[:2] == ["python", "-m"]:
            assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        elif words[0] == "python":
            assert words[1] in COMMANDS and (ROOT / words[1]).is_file()
        elif words[0] in ("docker", "kind", "kubectl"):
            assert span in OF_CONTAINERS, "as it stands on the page that says how"
            assert all((ROOT / word).exists() for word in words if word.startswith("infra/"))
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for preset in re.findall(r"--config ([a-z][\w-]+)", here):
        assert (ROOT / "slm_ray" / "presets" / f"{preset}.yaml").is_file(), preset


def test_every_option_of_a_row_is_one_of_its_script() -> None:
    named = {pair for cells in TABLE for pair in options_of(cells[2])}
    assert len(named) > 60
    unknown = {(script, option) for script, option in named if option not in BEAMS_OWN and not is_known(script, option)}
    assert unknown == set()


PARSERS = {
    "pipelines/prepare.py": options.parse,
    "slm_ray/train.py": train.parse_config,
    "tune/sweep.py": sweep.parse_config,
}
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|gpt2|\.model\b")  # FILE, NAME, DIR; a tokenizer would be looked for


def test_values_of_the_options_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(span) for cells in TABLE for span in spans(cells[2]) if span.startswith("python ")]
    tried = 0
    for _, script, *words in commands:
        if script in PARSERS and not PLACEHOLDER.search(" ".join(words)):
            PARSERS[script](words)
            tried += 1
    assert tried > 30


def test_options_are_looked_for_as_whole_words() -> None:
    assert is_known("slm_ray/train.py", "--model.n-layers") and not is_known("slm_ray/train.py", "--model.n")
    cell = "`python a.py --one 1`, or `--two`; `make x`, `--three` and `python -m a.b --four`"
    assert options_of(cell) == [("a.py", "--one"), ("a.py", "--two")]

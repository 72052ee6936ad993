"""`make setup` finds a Python that is too old, and mends an environment that is half made or has no pip; the targets of
the commands make what is not there yet, and nothing twice."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile alone: nothing to install but an empty package without dependencies."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    return tmp_path


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def python(path: Path, *, modules: str, log: Path) -> Path:
    """A stand-in that runs `-c CODE`, has these modules for `-m` (ensurepip brings pip), and notes what ran."""
    return script(
        path,
        f'[ "$1" = -c ] && exec {sys.executable} "$@"',
        f'[ -e "$0.pip" ] || case " {modules} " in *" $2 "*) ;; *) exit 1;; esac',
        f'echo "$(basename "$0") $2 $3" >> {log}',
        'if [ "$2" = ensurepip ]; then touch "$0.pip"; fi',
        'if [ "$2" = venv ]; then rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi',
    )


def setup(checkout: Path, python: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["make", "--silent", "setup", f"PYTHON={python}"], cwd=checkout, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_an_old_python_is_refused_in_one_line_and_leaves_nothing(checkout: Path) -> None:
    code, error = setup(checkout, script(checkout / "python3.8", "exit 1"))
    assert code == 2
    assert error.splitlines()[0].endswith(
        "python3.8 is not Python 3.11 or newer: name one, as in make PYTHON=python3.12"
    )
    assert not (checkout / ".venv").exists()


def test_a_half_made_environment_is_made_again(checkout: Path) -> None:
    log = checkout / "log"
    python(checkout / ".venv/bin/python", modules="none", log=log)
    assert setup(checkout, python(checkout / "python3.12", modules="venv pip", log=log)) == (0, "")
    assert log.read_text().splitlines() == ["python3.12 venv --clear", "python pip install"]


def test_an_environment_of_an_old_python_is_made_again(checkout: Path) -> None:
    log = checkout / "log"
    script(checkout / ".venv/bin/python", '[ "$1" = -m ]')
    assert setup(checkout, python(checkout / "python3.12", modules="venv pip", log=log)) == (0, "")
    assert log.read_text().splitlines() == ["python3.12 venv --clear", "python pip install"]


def test_an_environment_without_pip_gets_it(checkout: Path) -> None:
    log = checkout / "log"
    python(checkout / ".venv/bin/python", modules="ensurepip", log=log)
    assert setup(checkout, script(checkout / "python3.8", "exit 1")) == (0, "")
    assert log.read_text().splitlines() == ["python ensurepip ", "python pip install"]


@pytest.fixture
def project(checkout: Path) -> Path:
    """A checkout that is set up: its python notes what it is told, and leaves what the commands would."""
    script(
        checkout / ".venv/bin/python",
        f'echo "$@" >> {checkout}/log',
        'case "$*" in',
        "  *--output*) ;;",
        "  *prepare.py*) mkdir -p data/tinystories; touch data/tinystories/manifest.json ;;",
        "  *sweep.py*) touch champion ;;",
        "  *--champion*) [ -e champion ] ;;",
        "esac",
    )
    (checkout / ".venv/.ready").touch()
    return checkout


PREPARE = "pipelines/prepare.py --runner DirectRunner"
ASKED, SERVE = "infra/doctor.py --champion", "serve/app.py --port 8000"


def ran(project: Path, *words: str) -> list[str]:
    """What one `make` runs."""
    log = project / "log"
    log.unlink(missing_ok=True)
    subprocess.run(["make", "--silent", *words], cwd=project, check=True, stdout=subprocess.DEVNULL)
    return log.read_text().splitlines()


def test_serving_makes_data_and_a_champion_once(project: Path) -> None:
    assert ran(project, "serve") == [ASKED, PREPARE, "tune/sweep.py", SERVE]
    assert ran(project, "serve", "PORT=8001") == [ASKED, "serve/app.py --port 8001"]
    assert ran(project, "evaluate") == [ASKED, "slm_ray/evaluate.py"]


def test_a_model_that_is_named_needs_no_champion(project: Path) -> None:
    assert ran(project, "serve", "MODEL=runs/a/best") == [f"{SERVE} --model runs/a/best"]
    given = ["MODEL=runs/a/best", "DATA=data/b", "ARGS=--json"]
    assert ran(project, "evaluate", *given) == ["slm_ray/evaluate.py --model runs/a/best --data data/b --json"]


def test_training_makes_its_data_once_and_options_go_to_the_command_alone(project: Path) -> None:
    assert ran(project, "train", "ARGS=--max-steps 5") == [PREPARE, "slm_ray/train.py --max-steps 5"]
    assert ran(project, "sweep", "ARGS=--no-final") == ["tune/sweep.py --no-final"]
    assert ran(project, "train", "DATA=data/b") == ["slm_ray/train.py --data data/b"]
    given = ["DATA=data/b", "ARGS=--source a.txt"]
    assert ran(project, "data", *given) == [f"{PREPARE} --output data/b --source a.txt"]


def test_the_doctor_comes_before_anything_is_installed(checkout: Path) -> None:
    script(checkout / "python3.12", 'echo "$@" > log')
    words = ["make", "--silent", "doctor", f"PYTHON={checkout}/python3.12", "ARGS=--offline"]
    subprocess.run(words, cwd=checkout, check=True)
    assert (checkout / "log").read_text() == "infra/doctor.py --offline\n"
    assert not (checkout / ".venv").exists()


def test_help_names_every_target_that_is_for_people(checkout: Path) -> None:
    shown = subprocess.run(["make", "--silent", "help"], cwd=checkout, check=True, capture_output=True, text=True)
    named = {line.split()[0] for line in shown.stdout.splitlines()}
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert set(phony.split()[1:]) - named == {"champion"}


def test_every_script_that_it_runs_is_there() -> None:
    named = re.findall(r"\b(?:pipelines|serve|slm_ray|tune|infra|tests)/[\w/]+\.py", (ROOT / "Makefile").read_text())
    assert "tests/bench/training/train.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tests_that_need_a_browser_are_counted_in_the_last_lines() -> None:
    pytest.importorskip("playwright.sync_api")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serve/test_page.py"]
    only = ["-k", "screen_reader or narrow_phone"]
    done = subprocess.run(
        [*command, *only], cwd=ROOT, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert "2 tests of the page did not run: no browser (apt-get install chromium)" in done.stdout.splitlines()[-3:]

"""How a command ends where its output, its streams or its home are not a developer's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROBE = """
import os, sys
from pathlib import Path
from slm_ray.cli.command import command
from slm_ray.errors import UserError
@command
def main():
    if os.environ.get("MOOD") == "mistake":
        raise UserError("not so")
    if os.environ.get("MOOD") == "socket":
        raise BrokenPipeError(32, "of a connection")
    print("streams", [stream is not None for stream in (sys.stdin, sys.stdout, sys.stderr)], Path.home())
    with open("record", "w") as file:
        print("number", file.fileno() > 2)
    for _ in range(int(os.environ.get("LINES", 0))):
        print("x" * 100)
    return 0
"""
SCRIPT = f"""
import sys
sys.path[0] = {str(ROOT)!r}
sys.path.insert(1, sys.argv[1])
from slm_ray.cli.script import run
run("probe")
"""


@pytest.fixture
def probe(tmp_path: Path) -> str:
    """A shell's words for a command that prints what it finds."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "script.py").write_text(SCRIPT)
    return f"{sys.executable} {tmp_path / 'script.py'} {tmp_path}"


def shell(line: str, cwd: Path, **variables: str | None) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in (os.environ | variables).items() if value is not None}
    command = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


@pytest.mark.parametrize("closed", ["<&-", "<&- 2>&-"])
def test_a_closed_stream_leads_nowhere_and_no_file_takes_its_number(closed: str, probe: str, tmp_path: Path) -> None:
    done = shell(f"{probe} {closed}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("streams [True, True, True]") and "number True" in done.stdout


def test_nothing_is_said_where_everything_is_closed(probe: str, tmp_path: Path) -> None:
    assert shell(f"{probe} <&- >&- 2>&-", tmp_path).returncode == 0
    assert shell(f"{probe} <&- >&- 2>&-", tmp_path, MOOD="mistake").returncode == 2


unbuffered = pytest.mark.parametrize("unbuffered", ["", "1"])  # as in the image


@unbuffered
@pytest.mark.parametrize("lines", ["0", "9999"])
def test_a_reader_that_leaves_is_no_traceback(lines: str, unbuffered: str, probe: str, tmp_path: Path) -> None:
    done = shell(f"{probe} | true", tmp_path, LINES=lines, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) in ((141, ""), (0, "")), "0 where all was written before the reader left"
    assert lines == "0" or done.returncode == 141


@unbuffered
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line(unbuffered: str, probe: str, tmp_path: Path) -> None:
    done = shell(f"{probe} > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    what = "a file" if unbuffered else "standard output"
    assert (done.returncode, done.stderr) == (2, f"error: {what} takes no more: No space left on device\n")


def test_an_error_of_something_else_than_the_output_stays_what_it_is(probe: str, tmp_path: Path) -> None:
    done = shell(probe, tmp_path, MOOD="socket")
    assert done.returncode == 1
    assert "BrokenPipeError: [Errno 32] of a connection" in done.stderr


def test_a_user_without_a_home_gets_that_of_docker(probe: str, tmp_path: Path) -> None:
    code = f"""
import os, pwd
def unknown(_):
    raise KeyError("uid not found")
pwd.getpwuid = unknown
exec(open({str(tmp_path / "script.py")!r}).read())
"""
    (tmp_path / "nameless.py").write_text(code)
    done = shell(f"{sys.executable} {tmp_path / 'nameless.py'} {tmp_path}", tmp_path, HOME=None)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith("] /")

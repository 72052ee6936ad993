"""A Ray of one's own on machines that are no developer's laptop: long TMPDIR, no home, no name."""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slm_ray.distributed import cluster, surroundings
from slm_ray.errors import UserError
from tests.support import nobody
from tests.support.listening import addresses_of

pytestmark = pytest.mark.ray

LONGEST_SESSION = "session_2026-11-26_03-45-50_070549_4194304"


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose /tmp is this short and empty folder, and which sets nothing."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", *surroundings.TOKEN_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(surroundings, "USUAL", folder / "tmp")
    monkeypatch.setattr(surroundings, "MAX_BASE_BYTES", len(str(folder)) + len("/tmp/ray-0123456789"))
    monkeypatch.setattr(Path, "home", lambda: folder / "home")
    return folder


def not_writable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Root may write everywhere, so the question is answered otherwise."""
    answer = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and answer(path, mode))


def test_the_bound_is_that_of_a_socket_of_ray() -> None:
    from ray._private.utils import validate_socket_filepath

    base = "/" + "x" * (surroundings.MAX_BASE_BYTES - 1)
    validate_socket_filepath(f"{base}/ray/{LONGEST_SESSION}/sockets/plasma_store")


def test_ray_goes_where_it_goes_by_itself(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert surroundings.session_folder() == str(machine / "tmp" / "ray")
    assert stat.S_IMODE((machine / "tmp" / "ray").stat().st_mode) == 0o777  # as Ray makes it, for the next user
    monkeypatch.setenv("TMPDIR", str(machine / "job"))
    assert surroundings.session_folder() == str(machine / "job" / "ray")
    monkeypatch.setenv("RAY_TMPDIR", str(machine / "ours"))
    assert surroundings.session_folder() == str(machine / "ours" / "ray")


@pytest.mark.parametrize("fault", ["long", "file", "not ours", "full"])
def test_a_tmpdir_of_no_use_is_passed_over(fault: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine / ("x" * 60 if fault == "long" else "job")
    monkeypatch.setenv("TMPDIR", str(folder))
    if fault == "file":
        folder.touch()
    elif fault == "not ours":
        not_writable(monkeypatch, folder / "ray")
    elif fault == "full":
        left = shutil.disk_usage
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path: SimpleNamespace(free=4096) if folder in path.parents else left(path)
        )
    assert surroundings.session_folder() == str(machine / "tmp" / "ray")


def test_where_another_user_keeps_the_usual_folder_there_is_one_of_ones_own(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_writable(monkeypatch, machine / "tmp" / "ray")
    own = machine / "tmp" / f"ray-{os.getuid()}" / "ray"
    assert surroundings.session_folder() == str(own)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    (machine / "tmp" / "ray-4711" / "ray").mkdir(parents=True)  # of the user before
    with pytest.raises(UserError, match=r"belongs to another user; set RAY_TMPDIR to a folder of your own, whose"):
        surroundings.session_folder()


def test_a_folder_that_was_named_is_taken_or_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = str(machine / ("x" * 60))
    monkeypatch.setenv("RAY_TMPDIR", named)
    with pytest.raises(UserError, match=rf"RAY_TMPDIR \({named}\) has a path of {len(named)} bytes"):
        surroundings.session_folder()
    (machine / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(machine / "file"))
    with pytest.raises(UserError, match="cannot be used"):
        surroundings.session_folder()


def home_is_a_file(home: Path) -> None:
    home.touch()


def token_is_of_another(home: Path) -> None:
    (home / ".ray" / "auth_token").mkdir(parents=True)  # cannot be read


@pytest.mark.parametrize("make", [home_is_a_file, token_is_of_another])
def test_a_token_that_cannot_lie_at_home_is_in_the_environment(
    make: Callable[[Path], None], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(machine / "home")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    surroundings.keep_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    surroundings.keep_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "given"


def test_a_token_at_home_stays_there(machine: Path) -> None:
    surroundings.keep_token()
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray makes one in ~/.ray"
    (machine / "home" / ".ray" / "auth_token").write_text("a token\n")
    surroundings.keep_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_ray_that_does_not_come_up_is_one_line_with_the_place_of_its_logs(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(*_: object, **options: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", too_slow)
    for name in cluster.LEAN_ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    line = "no local Ray could be started: The current node timed out during startup. (its logs are in "
    with pytest.raises(UserError, match=re.escape(f"{line}{machine}/tmp/ray/session_latest/logs)")):
        cluster.connect()


CODE = """
import os
from slm_ray.cli.script import set_default_environment
set_default_environment()
import ray
from slm_ray.distributed import cluster
cluster.connect(with_dashboard=True)
print(os.getuid(), ray.get(ray.remote(lambda: os.getuid()).remote()), flush=True)
input()
"""


def test_ray_starts_for_a_user_without_name_and_home_below_a_long_tmpdir(tmp_path: Path) -> None:
    """With a dashboard, as in a sweep; and nothing of it listens beyond this machine."""
    folder = nobody.folder_of_nobody(tmp_path / "job")
    environment = nobody.environment_of_nobody(folder)
    words = [*nobody.as_nobody(), sys.executable, "-c", CODE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd="/", env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        addresses = addresses_of(process.pid) if said else set()
        _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors[-2000:]
    uid = nobody.UID if nobody.as_nobody() else os.getuid()
    assert said == f"{uid} {uid}\n"
    assert addresses == {"127.0.0.1"}

"""`make demo`: what it starts, what it says when something is in the way, and how it ends.

Its commands are stand-ins here (`tests/support/demo_checkout.py`); the real ones are tested elsewhere.
"""

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipelines import options
from tests.support.demo_checkout import SETTINGS, DemoCheckout
from tests.support.paths import ROOT
from tune import sweep
from tune.config import space_of
from tune.space import n_points

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "infra" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_port_in_use_is_one_clear_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, str(ROOT / "infra" / "demo.py"), "--port", str(port), "--once"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: port {port} on 127.0.0.1 is in use: `make demo PORT=8001`\n"
    assert done.stdout == ""


def test_a_port_that_is_none_is_one_clear_line(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--port", "70000"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: port 70000 on 127.0.0.1 cannot be listened on (") and error.count("\n") == 1


def test_its_commands_are_ones_that_the_scripts_accept(demo: ModuleType) -> None:
    _, settings = options.parse(shlex.split(demo.PREPARE)[1:])
    assert settings.source == ("sample",)
    config = sweep.parse_config(shlex.split(demo.SWEEP)[1:])
    assert n_points(space_of(config)) == 4
    assert config.workers == 2
    config.check_batch(2)


@pytest.fixture
def checkout(tmp_path: Path) -> DemoCheckout:
    return DemoCheckout(tmp_path)


def test_the_demo_runs_its_commands_in_turn_and_leaves_the_server_quietly(checkout: DemoCheckout) -> None:
    code, out, errors = checkout.run("--once")
    assert (code, errors) == (0, "")
    assert "Once upon a time there was a \u732b cat." in out
    assert [line.split()[0] for line in checkout.log] == ["prepare", "sweep", "app", "app"]
    assert checkout.log[-1] == "app got SIGTERM"
    assert checkout.alive() == []


def test_the_demo_ends_well_behind_a_proxy_and_where_output_is_ascii(
    checkout: DemoCheckout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion may be a model of other stories, and a proxy knows nothing of this machine's 127.0.0.1."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    code, out, errors = checkout.run("--once")
    assert (code, errors) == (0, "")
    assert "there was a \\u732b cat." in out


def test_a_second_start_asks_for_the_same_names_so_that_what_is_finished_is_not_done_again(
    checkout: DemoCheckout,
) -> None:
    begun = []
    for _ in range(2):
        assert checkout.run("--once")[0] == 0
        begun.append([line for line in checkout.log if line.startswith(("prepare --", "sweep --"))])
        (checkout.folder / "log").unlink()
    assert begun[0] == begun[1]
    assert all(
        " --output data/demo-" in line or (" --resume " in line and " --name demo-" in line) for line in begun[0]
    )


@pytest.mark.parametrize("path", SETTINGS)
def test_other_settings_get_other_names(path: str, checkout: DemoCheckout) -> None:
    assert checkout.run("--once")[0] == 0
    with (checkout.folder / path).open("a") as file:
        file.write("# a later version\n")
    assert checkout.run("--once")[0] == 0
    names = {line.split()[-1] for line in checkout.log if line.startswith("sweep --")}
    assert len(names) == 2


def test_a_folder_of_somebody_else_is_refused_before_anything_starts(checkout: DemoCheckout) -> None:
    assert checkout.run("--once")[0] == 0
    name = next(line.split()[-1] for line in checkout.log if line.startswith("sweep --"))
    (checkout.folder / "log").unlink()
    folder = checkout.folder / "runs" / name
    folder.mkdir(parents=True)
    assert checkout.run("--once")[0] == 0, "an empty one is in nobody's way"
    (checkout.folder / "log").unlink()
    (folder / "novel.txt").touch()
    code, out, errors = checkout.run("--once")
    assert (code, out) == (2, "")
    assert errors == f"error: {folder} is in the way and no folder of a sweep: move it elsewhere\n"
    assert checkout.log == []


@pytest.mark.parametrize(("failing", "begun"), [("prepare", 1), ("sweep", 2)])
def test_a_step_that_fails_is_named_and_is_the_last(failing: str, begun: int, checkout: DemoCheckout) -> None:
    code, _, errors = checkout.run(**{failing: "7"})
    assert code == 2
    assert re.fullmatch(rf"error: this step ended with exit code 7, see above: python \w+/{failing}\.py .*\n", errors)
    assert len(checkout.log) == begun


def test_a_server_that_leaves_is_said(checkout: DemoCheckout) -> None:
    code, _, errors = checkout.run(app="2")
    assert (code, errors) == (2, "error: the server ended with exit code 2, see above\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["prepare", "sweep", "app"])
def test_a_signal_ends_the_demo_and_its_command(moment: str, number: signal.Signals, checkout: DemoCheckout) -> None:
    with checkout.start(**{moment: "slow"}) as process:
        checkout.wait_for(moment, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.endswith("\ndemo stopped; what is finished is kept, `make demo` goes on from there\n")
    assert checkout.log[-1] == f"{moment} got {'SIGTERM' if moment == 'app' else 'SIGINT'}"
    assert checkout.alive() == []


def test_ctrl_c_while_the_server_answers_ends_it(checkout: DemoCheckout) -> None:
    with checkout.start() as process:
        assert process.stdout is not None
        assert any(line == "The server runs until Ctrl-C.\n" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" not in errors
    assert (checkout.log[-1], checkout.alive()) == ("app got SIGTERM", [])


def test_ctrl_c_again_kills_a_command_that_does_not_end(checkout: DemoCheckout) -> None:
    with checkout.start(sweep="deaf") as process:
        checkout.wait_for("sweep", process)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    assert process.returncode == 130
    assert checkout.alive() == []


def test_a_step_that_was_interrupted_by_itself_ends_the_demo_so(checkout: DemoCheckout) -> None:
    assert checkout.run(sweep="130")[0] == 130


def test_a_signal_while_a_command_is_being_started_leaves_no_process(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: Any, **options: Any) -> "subprocess.Popen[bytes]":
        started.append(really_start(*words, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    really_start = subprocess.Popen
    (tmp_path / "wait.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        demo._run("wait.py")
    assert started[0].returncode is not None

"""The README's path as a user walks it: prepare, train, register, serve, and a story over HTTP."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest

from pipelines import prepare
from serve import app
from slm_ray import evaluate, export, generate, train
from slm_ray.dataset.manifest import load_manifest
from slm_ray.runs import checkpoint
from slm_ray.tracking import mlflow_runs
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tune import sweep

pytestmark = pytest.mark.ray

Main = Callable[[list[str]], int]
TINY = "--model.n_layers 1 --model.d_model 32 --model.n_heads 2 --model.d_ff 32 --model.seq_len 32 --batch-size 8"

OF_A_CLUSTER = ("IDLE", "PlacementGroupCleaner", "PreemptionWatcher", "DatasetManager")
"""Processes that wake all the time and that a training on a Ray of its own has no use for."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which the commands run, as a user's checkout."""
    return tmp_path_factory.mktemp("home")


def environment() -> dict[str, str]:
    return dict(os.environ) | {"RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}


def run(home: Path, line: str) -> "subprocess.CompletedProcess[str]":
    script, *rest = line.split()
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=home, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@contextlib.contextmanager
def server(home: Path, line: str, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    script, *rest = line.split()
    command = [sys.executable, str(ROOT / script), *rest, "--port", str(port)]
    process = subprocess.Popen(command, cwd=home, env=environment(), start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, "the server left"
            assert time.monotonic() < deadline, "the server did not answer"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.3)
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
            _, left = psutil.wait_procs(children, timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            left = children
        for child in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        assert not left, f"processes left behind: {left}"


def answer_of(main: Main, capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What a command prints, run in this process: to start it as a user does takes longer than its work."""
    capsys.readouterr()
    assert main(line.split()) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_from_stories_to_an_answer_over_http(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = run(
        home, "pipelines/prepare.py --runner DirectRunner --source sample --max-stories 300 --vocab-size 512"
    )
    assert prepared.returncode == 0, prepared.stderr
    manifest = load_manifest(home / "data" / "tinystories")
    assert manifest.counts["read"] == 300

    trained = run(home, f"slm_ray/train.py --name first --max-steps 12 --register tinystories {TINY}")
    assert trained.returncode == 0, trained.stderr
    assert "bits per byte" in trained.stdout
    assert "tinystories version 1 is the champion now" in trained.stdout
    best = home / "runs" / "first" / "best"
    assert checkpoint.load_state(best).data_fingerprint == manifest.fingerprint

    told = run(home, "slm_ray/generate.py --prompt Once --max-tokens 20 --seed 1")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("Once")
    measured = run(home, "slm_ray/evaluate.py --measure windows --json")
    assert measured.returncode == 0, measured.stderr
    got = json.loads(measured.stdout)
    assert got["data_fingerprint"] == manifest.fingerprint
    assert got["loss"] == pytest.approx(checkpoint.load_state(best).metrics.val_loss, rel=0.02)
    monkeypatch.chdir(home)
    rounded = json.loads(answer_of(evaluate.main, capsys, "--measure windows --backend onnx-int8"))
    assert rounded["bits_per_byte"] == pytest.approx(got["bits_per_byte"], rel=0.02)
    answer_of(export.main, capsys, "--output away")
    assert (home / "away" / "model.safetensors").is_file()
    assert export.main(["--output", "away"]) == 2

    port = free_port()
    with server(home, "serve/app.py", port):
        body = {"prompt": "Once upon a time", "max_tokens": 30, "seed": 3}
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60)
        assert answer.status_code == 200
        content = answer.json()
        assert content["story"].startswith("Once upon a time")
        assert content["finish_reason"] in ("stop", "length")
        assert content["model"]["name"] == "tinystories"
        assert content["model"]["version"] == "1"
        assert content["model"]["data_fingerprint"] == manifest.fingerprint
        refused = httpx.post(f"http://127.0.0.1:{port}/generate", json={"prompt": 3}, timeout=60)
        assert 400 <= refused.status_code < 500


@pytest.mark.slow
def test_ctrl_c_ends_a_training_plainly_that_had_no_process_and_no_listener_too_many(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Its own Ray starts none that only a cluster needs, and none listens beyond loopback."""
    line = f"--data {tiny_data} --name long --max-steps 100000 --workers 1 {TINY}"
    command = [sys.executable, str(ROOT / "slm_ray" / "train.py"), *line.split()]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert any(shown.startswith("training from the start") for shown in process.stderr), "it did not begin"
        time.sleep(3)  # Ray starts some of its processes beside the training
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        commands = [" ".join(one.cmdline()) for one in family if one.is_running()]
        # torch's rendezvous (TCPStore) in the workers binds to every interface and cannot be told otherwise
        ours = [one for one in family if "RayTrainWorker" not in " ".join(one.cmdline())]
        open_to = {c.laddr.ip for one in ours for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=90)
        _, left = psutil.wait_procs(family, timeout=30)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    titles = [command.removeprefix("ray::") for command in commands if command.startswith("ray::")]
    assert any(title.startswith("RayTrainWorker") for title in titles)
    assert [title for title in titles if title.startswith(OF_A_CLUSTER)] == []
    assert all("--disable-frontend" in command for command in commands if "dashboard/dashboard.py" in command)
    assert open_to, "no listening socket was seen: the check looked in the wrong place"
    assert {ip.removeprefix("::ffff:") for ip in open_to} <= {"127.0.0.1", "::1"}
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert "stopped, with a checkpoint of step" in errors
    assert checkpoint.load_state(tmp_path / "runs" / "long" / "latest").step > 0
    assert not left
    (run,) = _runs(tmp_path / "mlflow.db")
    assert run.info.status == "KILLED"


def _runs(store: Path) -> list[Any]:
    client = mlflow_runs.client(f"sqlite:///{store}")
    found = client.search_runs([client.get_experiment_by_name("slm-ray").experiment_id])
    return [run for run in found if run.data.tags["slm_ray.kind"] == "training"]  # not their attempts


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (prepare.main, ["--runner", "DirectRunner", "--source", "no/such/folder"]),
        (train.main, ["--data", "no/such/folder"]),
        (sweep.main, ["--data", "no/such/folder"]),
        (app.main, ["--model", "no/such/folder"]),
        (generate.main, ["--model", "no/such/folder"]),
        (evaluate.main, ["--data", "no/such/folder"]),
        (export.main, ["--model", "no/such/folder"]),
    ],
)
def test_a_wrong_path_is_one_clear_line_and_2(
    main: Main,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no/such/folder" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [prepare, train, sweep, app, generate, evaluate, export])
def test_every_command_has_help_with_defaults(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert "default" in capsys.readouterr().out

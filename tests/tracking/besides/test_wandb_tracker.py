"""wandb without a network: what is in its files, what is not, and what happens where it fails or is missing."""

import dataclasses
import importlib.util
import os
import socket
import struct
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.schema import TrainConfig
from slm_ray.tracking.besides.wandb_tracker import WandbTracker, public_config, require_wandb
from slm_ray.train import main

WRITTEN_WITHIN_S = 30
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
SECRET = "hunter2"


@pytest.fixture
def config(tiny_config: TrainConfig, tmp_path: Path) -> dict[str, Any]:
    changes = {"tracking_uri": f"https://me:{SECRET}@mlflow.example/x?token={SECRET}", "output": str(tmp_path / "runs")}
    return dataclasses.asdict(dataclasses.replace(tiny_config, **changes))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only loopback: wandb's own service listens there."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.parametrize("spec", [None, ModuleSpec("wandb", None, is_package=True)], ids=["none", "a folder"])
def test_the_option_without_the_package_is_one_line_and_2_before_anything_starts(
    spec: ModuleSpec | None,
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "wandb" else find(name))
    assert main(["--data", tiny_config.data, "--output", tiny_config.output, "--wandb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --wandb needs the package wandb: `pip install 'slm-ray[wandb]'`")
    assert not Path(tiny_config.output).exists()


def test_its_config_has_no_password_and_no_place(config: dict[str, Any], tmp_path: Path) -> None:
    public = public_config(config | {"init_from": "/home/me/model", "register": "tiny"})
    assert public["model.d_model"] == config["model"]["d_model"] and public["register"] == "tiny"
    assert public["data"] == Path(config["data"]).name
    assert not any("/" in str(value) or SECRET in str(value) for value in public.values())
    assert not {"output", "tracking_uri", "init_from"} & public.keys()


@needs_wandb
def test_records_are_kept_offline_and_a_resumed_run_goes_on_in_the_same_one(
    config: dict[str, Any], tmp_path: Path, offline: None
) -> None:
    require_wandb()
    said: list[str] = []
    folder = tmp_path / "wandb"
    for steps in ((10, 20), (20, 30)):
        tracker = WandbTracker(folder, "tiny", config, said.append)
        for step in steps:
            tracker.log_metrics({"train_loss": step / 7}, step)
        tracker.log_text("Once upon", f"samples/step-{steps[-1]:08d}.txt")
        tracker.log_text("a: 1", "config.yaml")
        tracker.finish()
    assert said == []
    files = sorted(folder.rglob("*.wandb"))
    assert len(files) == 2 and len({path.stem for path in files}) == 1, "two stretches of one run"
    # wandb writes one for each stretch, or one for both: whichever it is, no machine has a name.
    assert {run.host for path in files for run in read(path, "run")} == {"unnamed"}
    deadline = time.monotonic() + WRITTEN_WITHIN_S  # wandb's own process writes, and may be behind
    while (records := [values(one) for path in files for one in read(path, "history")]) and time.monotonic() < deadline:
        if sum(line.get("samples") == '"Once upon"' for line in records) == 2:
            break
        time.sleep(0.2)
    logged = [(line["step"], line["train_loss"]) for line in records if "train_loss" in line]
    assert logged == [(str(step), repr(step / 7)) for step in (10, 20, 20, 30)]
    assert sum(line.get("samples") == '"Once upon"' for line in records) == 2
    assert not {path.name for path in folder.rglob("*") if path.is_file()} & {"requirements.txt", "wandb-metadata.json"}
    assert not [name for path in files for name in read(path, "files")]
    sent = [path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts and path.suffix != ".log"]
    content = b"".join(path.read_bytes() for path in sent)
    for absent in (SECRET, str(tmp_path), str(Path.cwd())):
        assert absent.encode() not in content


def read(path: Path, kind: str) -> list[Any]:
    """The records of one kind in a run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = map(Record.FromString, blocks(path.read_bytes()))
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def values(history: Any) -> dict[str, str]:
    """JSON by its names."""
    return {item.key or ".".join(item.nested_key): item.value_json for item in history.item}


def blocks(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind wandb's header: checksum, length, kind, data."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # a block's end that holds no header
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@needs_wandb
def test_a_wandb_that_fails_costs_a_warning(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(**_: object) -> None:
        raise wandb.Error("no account")

    monkeypatch.setattr(wandb, "init", fail)
    said: list[str] = []
    tracker = WandbTracker(tmp_path / "wandb", "tiny", config, said.append)
    tracker.log_metrics({"train_loss": 2.0}, 1)
    tracker.close()
    assert said[0] == "wandb does not take the records, the run goes on without: no account"

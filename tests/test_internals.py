"""What other packages do not promise: every such name is there, stands in one list, and is not missed where it is gone.

After an upgrade of torch, Beam, MLflow or Ray, this file says what changed.
"""

import ast
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from apache_beam.options import pipeline_options

from pipelines import options
from serve import ray_connection, replica_port
from slm_ray import internals
from slm_ray.cli.script import DEFAULT_ENVIRONMENT
from slm_ray.distributed import cluster, workers
from slm_ray.errors import UserError
from slm_ray.tracking import system_metrics
from slm_ray.training import hardware
from tests.support.paths import ROOT

CODE = [path for room in ("pipelines", "slm_ray", "tune", "serve", "infra") for path in (ROOT / room).rglob("*.py")]
PYTHONS_OWN = {"_exit", "_option_string_actions"}  # of os; of argparse, asked for with a default
SETTINGS = {  # package -> undocumented environment variables that are set for it
    "ray": {
        *cluster.LEAN_ENVIRONMENT,
        *(ray_connection.LOCAL_SETTINGS.keys() - {"FORWARDED_ALLOW_IPS"}),
        *(DEFAULT_ENVIRONMENT.keys() - {"MLFLOW_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY"}),
        workers.HEALTH_TIMEOUT,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    },
    "mlflow": {"MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", system_metrics.INTERVAL},
    "onnxruntime": {"ORT_DISABLE_TELEMETRY"},
    "uvicorn": {"FORWARDED_ALLOW_IPS"},
}
ELSEWHERE = {"rllib", "tests", "examples", "node_modules", "server", "thirdparty_files", "llm", "data"}
PROGRAMS = (
    "_raylet.so",
    "core/src/ray/raylet/raylet",
    "capi/onnxruntime_pybind11_state*",
)  # settings written `RAY_name` there are `name`


@pytest.mark.parametrize("name", internals.NAMES)
def test_the_installed_versions_have_every_name(name: str) -> None:
    assert internals.find(name) is not None, f"{name} is gone; done without it: {internals.NAMES[name]}"


def private_names(path: Path) -> Iterator[str]:
    """Names with one leading underscore that a file takes from something else than itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def own_names(path: Path) -> set[str]:
    """Private attributes that the classes of a file give their own objects: `other._text` in a copy is one of ours."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_no_private_name_is_used_that_the_list_lacks() -> None:
    listed = {part for name in internals.NAMES for part in name.replace(":", ".").split(".")} | PYTHONS_OWN
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in CODE
        for name in set(private_names(path)) - own_names(path)
        if isinstance(name, str) and name[:1] == "_" and name[1:2] not in ("_", "") and name not in listed
    }
    assert found == set()


@pytest.mark.parametrize("package", SETTINGS)
def test_the_installed_versions_read_every_variable_that_is_set_for_them(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    missing = {name: name.encode() for name in SETTINGS[package]}
    for path in (*(path for name in PROGRAMS for path in folder.glob(name)), *sources(folder)):
        content = path.read_bytes() if path.is_file() else b""
        for name, word in list(missing.items()):
            if word in content or (path.suffix != ".py" and word.removeprefix(b"RAY_") in content):
                del missing[name]
        if not missing:
            break
    assert missing.keys() == set()


def sources(folder: Path) -> Iterator[Path]:
    """The Python files of a package, those that read settings."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in ELSEWHERE:
            yield from sources(path)
        elif path.suffix == ".py":
            yield path


def test_a_name_that_is_gone_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(internals, "NAMES", {"torch.cpu:_is_gone": "precision auto is fp32", "gone:name": "nothing"})
    with caplog.at_level(logging.DEBUG, "slm_ray.internals"):
        assert internals.find("torch.cpu:_is_gone", bool) is bool
        assert internals.find("gone:name") is None
    assert "no torch.cpu:_is_gone: precision auto is fp32" in caplog.text
    assert "no gone:name: nothing" in caplog.text


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names put here are as if the installed version had none of them."""
    names: set[str] = set()
    find = internals.find
    monkeypatch.setattr(internals, "find", lambda name, default=None: default if name in names else find(name, default))
    return names


def test_without_torchs_word_on_the_cpu_precision_is_fp32(gone: set[str]) -> None:
    gone |= {name for name in internals.NAMES if name.startswith("torch.cpu")}
    assert hardware.resolve_precision("auto", torch.device("cpu")) == "fp32"


def test_without_beams_parser_its_options_pass_unchecked(gone: set[str], tmp_path: Path) -> None:
    words = ["--source", "sample", "--output", str(tmp_path / "data"), "--direct_num_wrokers", "2"]
    with pytest.raises(UserError, match="unknown option --direct_num_wrokers: did you mean --direct_num_workers"):
        options.parse(words)
    gone.add("apache_beam.options.pipeline_options:_BeamArgumentParser")
    beam_options, config = options.parse(words)
    assert isinstance(beam_options, pipeline_options.PipelineOptions)
    assert config.source == ("sample",)


def test_without_the_function_that_opens_a_replicas_port_no_server_starts(gone: set[str]) -> None:
    gone.add("ray.serve._private.replica:add_port_to_grpc_server")
    with pytest.raises(UserError, match=f"Ray {ray.__version__} opens the ports of its replicas .* constraints.txt"):
        replica_port.check_replica_port()
    with pytest.raises(UserError, match="listen on every interface"):
        replica_port.bind_replica_port()


@pytest.mark.parametrize("is_running", [True, False])
def test_without_serves_client_another_serve_is_found_by_its_status(
    is_running: bool, gone: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone.add("ray.serve.context:_get_global_client")
    status = SimpleNamespace(proxies={"a": 1} if is_running else {}, applications={})
    monkeypatch.setattr("ray.serve.status", lambda: status)
    if not is_running:
        ray_connection.check_no_other_serve()
        return
    with pytest.raises(UserError, match=r"^Ray Serve runs in this cluster already: end it with `serve shutdown`"):
        ray_connection.check_no_other_serve()

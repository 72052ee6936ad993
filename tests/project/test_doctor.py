"""`infra/doctor.py`: what it sees of a machine, of limits and of services, and what follows."""

import ast
import http.server
import json
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import doctor, machine, services
from infra.machine import GIB, Finding
from slm_ray import limits
from slm_ray.errors import UserError
from tests.support.paths import ROOT
from tests.support.ports import free_port


def write(root: Path, files: dict[str, str]) -> Path:
    """Files of a system that is not this one."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "MLFLOW_TRACKING_URI", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_here_it_says_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--offline", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["is_ready"]
    names = [finding["name"] for finding in content["findings"]]
    assert len(names) == len(set(names)) == 25
    assert all(finding["found"] and finding["advice"] for finding in content["findings"])
    assert doctor.main(["--offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= doctor.WIDTH for line in lines if not line.lstrip().startswith("->"))  # commands stay whole
    assert [*tmp_path.iterdir()] == []


def test_without_any_package_it_says_what_is_missing_and_ends_with_1() -> None:
    command = [sys.executable, "-S", "infra/doctor.py", "--offline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    missing = [line for line in done.stdout.splitlines() if line.startswith("X ")]
    assert len(missing) == 1 and "base packages" in missing[0] and "-> `make setup`" in done.stdout
    assert "extra train" in done.stdout and "pip install -c constraints.txt -e '.[train]'" in done.stdout


def test_with_the_base_alone_nothing_that_is_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"ftfy", "numpy", "pyarrow", "tokenizers", "universal-pathlib"}
    for module in (machine, services):
        monkeypatch.setattr(module, "version_of", lambda name: "1.0" if name in base else None)
    assert doctor.main(["--offline"]) == 0
    out = capsys.readouterr().out
    assert "! extra serve" in out and "! torch" in out and "! Ray " in out and "! MLflow store" in out


def test_an_old_python_can_read_the_script_up_to_its_sentence() -> None:
    text = (ROOT / "infra" / "doctor.py").read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 7))
    assert text.index("sys.exit(") < text.index("from slm_ray")


def test_a_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/kubepods"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/pod1\n",
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n",
            f"{top}/pod1/memory.max": "max\n",
            f"{top}/pod1/memory.current": str(GIB),
            f"{top}/memory.max": f"{4 * GIB}\n",
            f"{top}/memory.current": f"{3 * GIB}\n",
            f"{top}/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            f"{top}/pod1/cpu.max": "150000 100000\n",
        },
    )
    assert limits.memory_within(root) == (4 * GIB, 2 * GIB)  # what is only a cache is free
    assert limits.cpu_limit(root) == 1.5
    found = machine.memory(root)
    assert found.state == "note" and found.found == "2.0 GiB free of 4.0 GiB by a container's limit"


def test_limits_of_the_first_version_count_too(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB // 2),  # the path is that of the host
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB // 4),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert limits.memory_within(root) == (GIB // 2, GIB // 4)
    assert limits.cpu_limit(root) == 0.5
    assert machine.memory(root).state == "missing"
    seen = machine.cores(root)
    assert seen.state == "note" and seen.found.endswith("of which a limit leaves 0.5")
    assert seen.advice.startswith("workers and threads are counted by the quota, as 1: ")


def test_no_limit_is_none(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n0::/\n",
            "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert limits.memory_within(root) == (16 * GIB, 12 * GIB)
    assert limits.cpu_limit(root) is None and limits.memory_limit(root) is None
    assert machine.memory(root).state == "ok"


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert limits.memory_within(tmp_path) is None
    assert machine.memory(tmp_path).found == "not known"
    assert "not known" in machine.cpu_features(tmp_path).found


@pytest.mark.parametrize(
    ("flags", "found", "advice"),
    [
        ("fpu avx2", "AVX2", "precision auto is fp32; short trainings are not compiled"),
        ("avx2 avx512f avx512_bf16", "AVX2, AVX-512, its bf16", "precision auto is bf16"),
        ("avx512f amx_tile", "AVX-512, AMX", "precision auto is bf16"),
        ("avx512f", "AVX-512", "precision auto is fp32"),
        ("sse2", "none of AVX2, AVX-512, AMX", "precision auto is fp32; short trainings are not compiled"),
    ],
)
def test_features_decide_about_precision(tmp_path: Path, flags: str, found: str, advice: str) -> None:
    seen = machine.cpu_features(write(tmp_path, {"proc/cpuinfo": f"model name\t: A CPU\nflags\t\t: {flags}\n"}))
    assert (seen.found, seen.advice) == (f"A CPU: {found}", f"on the CPU {advice}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_said_of_this_cpu_is_what_a_training_does() -> None:
    torch = pytest.importorskip("torch")
    from slm_ray.training.hardware import resolve_precision

    seen = machine.cpu_features()
    if "not known" not in seen.found:
        assert f"precision auto is {resolve_precision('auto', torch.device('cpu'))}" in seen.advice


def test_a_gpu_is_named_and_a_torch_that_cannot_see_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.gpus(tmp_path) == []
    place = "proc/driver/nvidia/gpus"
    root = write(tmp_path, {f"{place}/{n}/information": "Model: \t\t NVIDIA H100\nIRQ: 3\n" for n in (0, 1)})
    assert machine.gpus(root) == ["NVIDIA H100", "NVIDIA H100"]
    assert machine.gpus(write(tmp_path / "b", {"dev/nvidia0": "", "dev/nvidiactl": ""})) == ["an NVIDIA GPU"]
    assert machine.gpus(write(tmp_path / "c", {"dev/kfd": ""})) == ["an AMD GPU"]
    for text, state, built in [("cuda = None", "note", "the CPU"), ("cuda: str = '13.0'", "ok", "CUDA 13.0")]:
        origin = write(tmp_path / "torch", {"version.py": f"hip: Optional[str] = None\n{text}\n"}) / "__init__.py"
        monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _, o=origin: SimpleNamespace(origin=str(o)))
        found = machine.torch_build(has_gpu=True)
        assert found.state == state and found.found.endswith(f"for {built}")


def test_torch_s_own_file_says_what_torch_says() -> None:
    torch = pytest.importorskip("torch")
    built = machine.torch_build(has_gpu=False).found
    assert built.startswith(torch.__version__)
    assert ("CUDA" in built) == bool(torch.version.cuda)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        use = ("a server", "choose another")
        monkeypatch.setattr(services, "PORTS", {taken: use, free_port(): use})
        assert [finding.state for finding in services.ports()] == ["note", "ok"]


def make_store(file: Path, *aliases: tuple[str, str, int]) -> None:
    store = sqlite3.connect(file)
    store.execute("CREATE TABLE registered_model_aliases (alias, version, name, workspace)")
    store.executemany("INSERT INTO registered_model_aliases (name, alias, version) VALUES (?, ?, ?)", aliases)
    store.commit()
    store.close()


def test_the_champion_is_read_without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.champion() is None and doctor.main(["--champion"]) == 1
    make_store(tmp_path / "mlflow.db", ("tinystories", "challenger", 2), ("other", "champion", 9))
    assert services.champion() is None and "nothing to serve yet" in services.store().advice
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/a store?.db")
    assert services.champion() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    make_store(tmp_path / "other.db", ("tinystories", "champion", 4))
    assert services.champion() == "4" and doctor.main(["--champion"]) == 0
    assert "version 4" in services.store().found


def test_a_store_that_is_written_by_mlflow_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables are not promised to anybody; the model is looked for in the one of a version that is installed."""
    pytest.importorskip("mlflow")
    from mlflow.store.model_registry.dbmodels import models

    columns = set(models.SqlRegisteredModelAlias.__table__.columns.keys())
    assert models.SqlRegisteredModelAlias.__tablename__ == "registered_model_aliases"
    assert {"name", "alias", "version"} <= columns


@pytest.mark.parametrize("text", ["no data base at all, but long enough to be looked at" * 50, ""])
def test_a_store_that_cannot_be_looked_at_is_not_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "mlflow.db").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        services.champion()
    assert doctor.main(["--champion"]) == 0
    assert services.store().state == "note"


def test_a_server_is_named_without_its_password_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_ADDRESS", "http://me:secret@127.0.0.1:1")
    assert doctor.main(["--champion"]) == 0
    for finding in (services.store(), services.ray()):
        assert "not asked" in finding.advice and "secret" not in str(finding)


def test_a_token_that_others_may_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert services.ray_token().found == "none"
    token = write(tmp_path, {".ray/auth_token": "secret"}) / ".ray" / "auth_token"
    token.chmod(0o644)
    assert services.ray_token().advice == "others may read it: chmod 600 ~/.ray/auth_token"
    token.chmod(0o600)
    assert services.ray_token().state == "ok" and "secret" not in str(services.ray_token())


def test_the_data_set_is_counted(tmp_path: Path) -> None:
    assert services.data_set().found == "none in data/tinystories"
    write(tmp_path, {"data/tinystories/manifest.json": '{"splits": {"train": {"rows": 20000}}}'})
    assert services.data_set().found == "data/tinystories, 20,000 stories"
    write(tmp_path, {"data/tinystories/manifest.json": "{"})
    assert services.data_set().state == "note"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that knows some data sets, and counts how it was asked."""

    status, asked = 200, list[str]()

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.status, Hub.asked = 200, []
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_is_asked_once_or_not_at_all(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    assert services.hub(is_offline=False).state == "ok"
    assert hub.asked == ["HEAD /api/datasets/roneneldan/TinyStories"]
    assert services.hub(is_offline=True).found == "not asked (--offline)"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert services.hub(is_offline=False).state == "note"
    assert len(hub.asked) == 1


def test_a_hub_that_refuses_or_is_away_is_said(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 503
    assert services.hub(is_offline=False).found.endswith("answered 503")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(services, "HUB_TIMEOUT_S", 0.2)
        found = services.hub(is_offline=False)
    assert found.state == "note" and "secret" not in found.found
    assert "sample corpus" in found.advice


def test_one_line_missing_is_enough_for_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Finding(name="disk", state="missing", found="0.1 GiB free", advice="free some")
    monkeypatch.setattr(doctor.machine, "disk", lambda _: gone)
    assert doctor.main(["--offline"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "X disk            0.1 GiB free -> free some" in out and out[-1].startswith("1 missing (X)")

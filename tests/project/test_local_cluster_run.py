"""`infra/local_cluster.sh` in truth: up, the user's commands by `ray job submit` to `s3://`, a node lost, down."""

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.cluster import answers, processes, state
from infra.cluster.processes import Part
from slm_ray.runs.remote_run import open_run
from slm_ray.storage import storage_path
from slm_ray.train import parse_config
from tests.project.test_monitoring import metrics_about, sample_names
from tests.support.fault_runs import assert_same_run, messages, run_without_faults
from tests.support.paths import ROOT

pytestmark = pytest.mark.ray

DATA = "s3://stories/data"
TINY = "--model.n_layers 1 --model.d_model 32 --model.n_heads 2 --model.d_ff 32 --model.seq_len 32 --model.dropout 0.1"
RUN = (
    f"--data {DATA} --name job --workers 1 --threads 1 --batch-size 8 --max-steps 1800 --eval-interval-steps 300 {TINY}"
)
RUN += " --log-interval-steps 50 --compile off --precision fp32"
BASE_PORT = 28380
WITHIN_S = 240


def script(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """`infra/local_cluster.sh` with this Python, whichever environment the checkout has."""
    command = [sys.executable, str(ROOT / "infra" / "local_cluster.py"), *words, "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[state.State]:
    """Two worker nodes of a CPU each, and whatever is left of them afterwards."""
    folder = tmp_path_factory.mktemp("cluster") / "state"
    done = script(folder, "up", "--base-port", str(BASE_PORT))
    assert done.returncode == 0, done.stdout + done.stderr
    made = state.read(folder)
    assert made is not None
    try:
        yield made
    finally:
        script(folder, "down")


@pytest.fixture(autouse=True)
def store(cluster: state.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds the store, and knows nothing of what it held before."""
    import s3fs

    for name, value in cluster.layout.users_environment().items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()


def environment(made: state.State) -> dict[str, str]:
    """As after `source environment`."""
    line = f"source {shlex.quote(str(made.layout.folder / 'environment'))} && env -0"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True, text=True)
    found = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    return {name: value for name, value in found.items() if name != "RAY_ADDRESS"}


def submitted(made: state.State, line: str, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--", *shlex.split(line)]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment(made), stdout=output, stderr=subprocess.STDOUT)


def family(made: state.State) -> set[psutil.Process]:
    heads = [process for part in made.parts if (process := processes.find(part))]
    return {*heads, *(child for head in heads for child in head.children(recursive=True))}


def training_node(made: state.State) -> Part:
    """The worker node on which the one worker trains."""
    for part in made.parts:
        head = processes.find(part) if part.name.startswith("worker") else None
        for child in head.children(recursive=True) if head else ():
            if "RayTrainWorker" in " ".join(child.cmdline()):
                return part
    raise AssertionError("nobody trains")


def wait_for(path: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until something lies in the store at an address."""
    deadline = time.monotonic() + WITHIN_S
    while not storage_path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def scraped_until_it_ends(made: state.State, process: "subprocess.Popen[bytes]") -> set[str]:
    """The names of all that Prometheus would find at the nodes meanwhile."""
    found, layout, deadline = set[str](), made.layout, time.monotonic() + WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        pages = [answers.ask(layout.metrics(node)) or b"" for node in layout.nodes]
        found |= sample_names(b"\n".join(pages).decode())
        time.sleep(1)
    return found


@pytest.mark.slow
def test_a_run_loses_its_node_and_ends_on_another_with_the_same_bits(cluster: state.State, tmp_path: Path) -> None:
    layout, log = cluster.layout, tmp_path / "log"
    jobs, token = f"{layout.dashboard}/api/jobs/", (layout.folder / state.TOKEN).read_text()
    assert answers.ask(jobs) is None and answers.ask(jobs, token=token) is not None, "anybody may submit a job"
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "AWS_ENDPOINT_URL"):
        assert environment(cluster)[name] == layout.users_environment()[name]
    few = "--source sample --max-stories 300 --vocab-size 512"
    line = f"python pipelines/prepare.py --runner DirectRunner {few} --output {DATA}"
    assert submitted(cluster, line, log).wait(WITHIN_S) == 0, log.read_text()[-3000:]

    train = submitted(cluster, f"python slm_ray/train.py --output s3://stories/runs {RUN}", log)
    wait_for("s3://stories/runs/job/checkpoints/step-00000300/complete.json", train, log)
    lost = training_node(cluster)
    processes.lose(lost, cluster.layout.mark)
    shown = scraped_until_it_ends(cluster, train)
    assert train.wait(WITHIN_S) == 0, log.read_text()[-3000:]
    assert metrics_about("training") - shown == set()

    folder = open_run("s3://stories/runs", "job")
    folder.fetch()
    said = messages(folder)
    print(said, log.read_text()[-1500:], sep="\n")
    assert any("resumed at step" in line for line in said)
    expected = run_without_faults(parse_config([*RUN.split(), "--output", str(tmp_path), "--tracking-uri", "none"]))
    assert_same_run(folder, expected)
    last = folder.latest_state()
    assert last is not None and last.step == 1800
    record = answers.ask(f"{layout.mlflow}/api/2.0/mlflow/runs/get?run_id={last.run_id}")
    assert record is not None and b'"FINISHED"' in record

    there = script(layout.folder, "status")
    assert there.returncode == 1
    gone = [line.split()[0] for line in there.stdout.splitlines() if " gone " in line]
    assert gone == [lost.name]


@pytest.mark.slow
def test_the_head_is_killed_and_comes_back_and_the_run_goes_on(cluster: state.State, tmp_path: Path) -> None:
    """Workers stay, the one that was lost is there again; a job that is submitted then finds data, run and record."""
    folder, log = cluster.layout.folder, tmp_path / "log"
    before = {part.name: part.pid for part in cluster.parts if processes.find(part)}
    done = script(folder, "restart-head")
    assert done.returncode == 0, done.stdout + done.stderr
    made = state.read(folder)
    assert made is not None and script(folder, "status").returncode == 0
    new = {part.name for part in made.parts if part.pid != before.get(part.name)}
    assert new == {"head", *(set(made.layout.names) - set(before))}

    job = open_run("s3://stories/runs", "job")
    job.fetch()
    earlier = job.latest_state()
    line = f"python slm_ray/train.py --output s3://stories/runs {RUN.replace('1800', '1900')} --resume"
    assert submitted(made, line, log).wait(WITHIN_S) == 0, log.read_text()[-3000:]
    job.fetch()
    last = job.latest_state()
    assert earlier is not None and last is not None
    assert (last.step, last.run_id) == (1900, earlier.run_id)
    assert b'"FINISHED"' in (answers.ask(f"{made.layout.mlflow}/api/2.0/mlflow/runs/get?run_id={last.run_id}") or b"")


@pytest.mark.slow
def test_down_leaves_nothing(cluster: state.State) -> None:
    made = state.read(cluster.layout.folder)
    assert made is not None
    everything = family(made)
    assert len(everything) > 10
    done = script(cluster.layout.folder, "down")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [one for one in everything if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert processes.marked(cluster.layout.mark) == set()
    assert not cluster.layout.ray_folder.exists()
    assert [path.name for path in cluster.layout.folder.iterdir()] == ["logs"]

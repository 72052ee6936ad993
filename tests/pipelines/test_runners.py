"""Any runner, any number of workers, any bundling: the same bytes. And nothing listens beyond this machine."""

import atexit
import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, SetupOptions
from apache_beam.runners.portability.job_server import StopOnExitJobServer, SubprocessJobServer

from pipelines import prepare, runner_names, runners
from slm_ray import internals
from slm_ray.errors import UserError
from slm_ray.preparation.resume import Completed
from tests.support.paths import ROOT
from tests.support.source_files import set_rows_per_range

SOURCE = ("--source", "sample", "--max-stories", "320", "--vocab-size", "512", "--near-duplicates", "0.8")
OF_ANOTHER = "beam-pipeline-temp-of-another"
TWO = ("--direct_num_workers", "2", "--direct_running_mode")


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    """Ranges of 50 stories, so that a small input has several."""
    set_rows_per_range(monkeypatch, 50)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", True),
        ("--runner DirectRunner", True),
        ("--runner=directrunner", True),
        ("--runner direct --source FlinkRunner.jsonl", True),
        ("--runner flink", False),
        ("--runner=dataflow", False),
        ("--runner FLINKRUNNER", False),
        ("--runner PortableRunner", False),
        ("--runner direct2", False),
        ("--runner TestDirectRunner", False),
        ("--runner DirectRunner --runner spark", False),
        ("--source flink --runner apache_beam.runners.portability.flink_runner.FlinkRunner", False),
    ],
)
def test_only_the_direct_runners_own_names_are_taken_for_it(words: str, expected: bool) -> None:
    """Both before Beam is imported and by Beam's own options."""
    assert runner_names.asks_for_direct(words.split()) == expected
    assert runners.is_direct(PipelineOptions(words.split())) == expected


@pytest.mark.parametrize(("runner", "is_lean"), [("flink", False), ("Direct", True)])
def test_only_a_local_job_leaves_out_the_clients_of_clouds(runner: str, is_lean: bool) -> None:
    words = ["-X", "importtime", "pipelines/prepare.py", "--runner", runner, "--no-such-option"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert ("pandas._libs" not in done.stderr) == is_lean


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory) -> dict[str, str]:
    """Digests of a data set that one thread made."""
    folder = tmp_path_factory.mktemp("in-memory") / "data"
    with pytest.MonkeyPatch.context() as patch:
        set_rows_per_range(patch, 50)
        assert prepare.main(["--output", str(folder), *SOURCE]) == 0
    return digests(folder)


@pytest.fixture
def listening() -> Iterator[set[str]]:
    """Addresses on which this process or one of its children listened during a test."""
    found: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                try:
                    opened = process.net_connections()
                except psutil.Error:  # it ended meanwhile
                    continue
                found.update(one.laddr.ip for one in opened if one.status == psutil.CONN_LISTEN)

    watching = threading.Thread(target=watch)
    watching.start()
    yield found
    done.set()
    watching.join()


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_and_listen_to_this_machine_alone(in_memory, listening, tmp_path):
    assert prepare.main(["--output", str(tmp_path / "data"), *SOURCE, *TWO, "multi_processing"]) == 0
    assert digests(tmp_path / "data") == in_memory
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_a_beam_with_other_names_inside_starts_the_workers_itself(in_memory, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runners, "forked_workers", None)
    assert prepare.main(["--output", str(tmp_path / "data"), *SOURCE, *TWO, "multi_processing"]) == 0
    assert digests(tmp_path / "data") == in_memory
    assert "every interface" not in caplog.text
    monkeypatch.setattr(internals, "find", lambda name: None)
    runners.keep_to_loopback()
    assert "servers of Beam" in caplog.text and "may listen on every interface" in caplog.text


def test_two_threads_give_the_same_bytes(in_memory, tmp_path):
    assert prepare.main(["--output", str(tmp_path / "data"), *SOURCE, *TWO, "multi_threading"]) == 0
    assert digests(tmp_path / "data") == in_memory


def test_ranges_in_another_order_give_the_same_bytes(in_memory, tmp_path, monkeypatch):
    in_order = Completed.left_to_read
    monkeypatch.setattr(Completed, "left_to_read", lambda done, plan: in_order(done, plan)[::-1])
    assert prepare.main(["--output", str(tmp_path / "data"), *SOURCE]) == 0
    assert digests(tmp_path / "data") == in_memory


@pytest.fixture
def job_service(tmp_path) -> Iterator[str]:
    """Beam's own job service in a process of its own; its address."""
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", "-p", "0"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # it leaves there what it was sent
    with (tmp_path / "log").open("w") as log:
        command += ["--port_file", str(port_file)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while not (port_file.exists() and port_file.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
            yield f"localhost:{port_file.read_text()}"
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files of this process, with a file of somebody else."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    (folder / OF_ANOTHER).touch()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.slow
def test_a_portable_runner_gives_the_same_bytes_and_leaves_nothing(in_memory, job_service, temporary, tmp_path):
    portable = ("--runner", "PortableRunner", "--job_endpoint", job_service, "--environment_type", "LOOPBACK")
    assert prepare.main(["--output", str(tmp_path / "data"), *SOURCE, *portable]) == 0
    assert digests(tmp_path / "data") == in_memory
    assert left_in(temporary) == [OF_ANOTHER]


def test_a_pipeline_that_never_runs_leaves_no_temporary_folder(temporary, tmp_path):
    """Beam removes its folder at the end of a run: not after Ctrl-C, a kill or a mistake in the graph."""
    runners.make_pipeline(PipelineOptions([]), tmp_path)
    assert left_in(temporary) == [OF_ANOTHER]


def test_what_beam_makes_for_another_runner_is_removed_with_its_folder(temporary):
    options = PipelineOptions(["--runner", "PortableRunner", "--requirements_file", "requirements.txt"])
    before = tempfile.gettempdir()
    with runners.own_temporary_folder(options) as remove:
        sent = Path(tempfile.mkdtemp())
        assert sent.parent.parent == temporary
        remove()
        assert not sent.exists()
        Path(tempfile.gettempdir()).mkdir()
        tempfile.mkdtemp()
    assert tempfile.gettempdir() == before and left_in(temporary) == [OF_ANOTHER]
    assert options.view_as(SetupOptions).requirements_cache == str(temporary / "beam-requirements-cache")
    with runners.own_temporary_folder(PipelineOptions([])):
        assert tempfile.gettempdir() == before


def test_a_job_server_that_beam_began_is_ended_at_the_end_of_the_process(temporary, monkeypatch):
    """Beam removes the server's folder first: where that was gone, the server stayed, as a process without a parent."""
    at_exit, ended = [], []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which Beam takes too

    class Server(SubprocessJobServer):
        def start(self):
            self._local_temp_root = tempfile.mkdtemp(prefix="beam-temp")
            self._server = SimpleNamespace(stop=lambda: ended.append(True))

    with runners.own_temporary_folder(PipelineOptions(["--runner", "FlinkRunner"])):
        StopOnExitJobServer(Server()).start()
    for function in reversed(at_exit):
        function()
    assert ended == [True] and left_in(temporary) == [OF_ANOTHER]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PortableRunner needs --job_endpoint HOST:PORT of a job service: start one with `python -m"),
        (["--job_endpoint", "localhost:1"], "no job service answers at --job_endpoint localhost:1: start one with"),
    ],
)
def test_a_job_service_that_is_not_there_is_one_clear_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(runners, "ANSWER_TIMEOUT_S", 0.5)
    assert prepare.main(["--output", str(tmp_path), *SOURCE, "--runner", "PortableRunner", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_program_that_cannot_be_fetched_is_one_clear_line(tmp_path):
    with (
        pytest.raises(
            UserError, match=r"could not be fetched \(Unable to fetch remote job server jar at .* infra/README"
        ),
        runners.user_errors(tmp_path),
    ):
        raise RuntimeError("Unable to fetch remote job server jar at https://place/flink.jar: no network")


def test_a_container_that_cannot_be_started_is_one_clear_line(tmp_path):
    """As Beam 2.77 says it of `--job_endpoint embed` where no Docker runs."""
    words = (
        "subprocess.CalledProcessError: Command '['docker', 'run', '-d', '--network=host', 'apache/beam']' returned 125"
    )
    with (
        pytest.raises(UserError, match=r"start Docker, or take workers without it, --environment_type LOOPBACK"),
        runners.user_errors(tmp_path),
    ):
        raise RuntimeError(f"Pipeline job-1 failed in state FAILED: Traceback (most recent call last):\n{words}")


@pytest.mark.parametrize(("given", "expected"), [("0", 3), ("2", 2)])
def test_all_cores_are_those_that_this_process_may_use(given, expected, monkeypatch):
    made = []
    monkeypatch.setattr(runners, "core_count", lambda: 3)
    monkeypatch.setattr(runners, "forked_workers", SimpleNamespace(prepare_forks=lambda n, _: made.append(n)))
    options = PipelineOptions(["--direct_num_workers", given, "--direct_running_mode", "multi_processing"])
    runners.prepare_workers(options)
    assert made == [expected] == [options.view_as(DirectOptions).direct_num_workers]  # Beam makes no others


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc")
def test_memory_that_is_freed_is_used_again_without_asking_the_system() -> None:
    script = """
import resource
import numpy as np
from pipelines.runners import keep_freed_memory
keep_freed_memory()
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(1_000_000) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new_pages(), new_pages())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second * 10 < first

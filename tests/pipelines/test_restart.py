"""Killed at any moment and started again: the same bytes, nothing finished done again, no half data set seen."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm_ray import storage
from slm_ray.dataset import manifest
from slm_ray.dataset.manifest import load_manifest
from slm_ray.preparation import cleaned_files
from slm_ray.preparation.summary_files import SUMMARIES
from tests.support.paths import ROOT

N_STORIES, ROWS_PER_RANGE = 90, 30
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["pipelines.prepare", "matplotlib.figure", "matplotlib.backends.backend_agg"]
)  # Beam is imported once for all runs below

CHANGES = ("replace_file", "put", "remove")
"""The operations that change files; `kill_at` counts them."""


def words(source: Path, output: Path, *more: str) -> list[str]:
    return ["--source", str(source), "--output", str(output), "--vocab-size", "300", *more]


def prepare(argv: list[str], log: str, kill_at: int = 0) -> None:
    """In a process of its own: prepare, and be killed in place of change number `kill_at`."""
    from pipelines.prepare import main
    from tests.support.source_files import set_rows_per_range

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    set_rows_per_range(pytest.MonkeyPatch(), ROWS_PER_RANGE)
    n_changes = 0

    def counted(change):
        def wrapped(*args):
            nonlocal n_changes
            n_changes += 1
            if n_changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args)

        return wrapped

    for name in CHANGES:
        change = getattr(storage, name)
        for module in [module for module in list(sys.modules.values()) if getattr(module, name, None) is change]:
            setattr(module, name, counted(change))
    code = main(argv)
    os.write(2, f"changes {n_changes}\n".encode())
    sys.exit(code)


def run(argv: list[str], log: Path, kill_at: int = 0) -> tuple[int, str]:
    process = FORKSERVER.Process(target=prepare, args=(argv, str(log), kill_at))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_files(output: Path) -> dict[str, int]:
    """Inodes of the shards of finished ranges, by name: a file that is written again has another."""
    found = {}
    for summary in output.glob(f".staging/*/{SUMMARIES}/*.json"):
        for shard in json.loads(summary.read_text())["shards"].values():
            places = [summary.parents[1] / shard["file"], output / shard["file"]]  # staged, or moved already
            found[shard["file"]] = next(path for path in places if path.exists()).stat().st_ino
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "mice.jsonl"
    texts = [
        f"Once upon a time there was a mouse with {number % 80} friends in house {number % 80}."
        for number in range(N_STORIES)
    ]
    texts[40] = "short"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """The files of a run that nothing disturbed, and how many changes it made."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, log = run(words(source, folder / "data"), folder / "log")
    assert code == 0
    return contents(folder / "data"), int(log.splitlines()[-1].split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_killed_at_any_change_it_ends_with_the_same_files(source, uninterrupted, tmp_path, share):
    whole, n_changes = uninterrupted
    data = tmp_path / "data"
    code, _ = run(words(source, data), tmp_path / "log", kill_at=1 + round(share * (n_changes - 1)))
    assert code == -signal.SIGKILL
    assert (data / manifest.MANIFEST).exists() == (share == 1)  # the last change removes the staging folder
    before = finished_files(data)

    code, log = run(words(source, data), tmp_path / "log")
    assert code == 0, log
    assert contents(data) == whole
    assert {name: (data / name).stat().st_ino for name in before} == before
    if before and share < 1:
        assert "skipping" in log or "finished what an interrupted job had begun to publish" in log


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_killed_job_leaves_the_earlier_data_set_whole(source, uninterrupted, tmp_path, share):
    _, n_changes = uninterrupted
    data = tmp_path / "data"
    assert run(words(source, data, "--max-stories", "50"), tmp_path / "log")[0] == 0
    earlier = contents(data)
    force = words(source, data, "--force")
    assert run(force, tmp_path / "log", kill_at=round(share * n_changes))[0] == -signal.SIGKILL
    assert {name: content for name, content in contents(data).items() if not name.startswith(".staging")} == earlier
    assert run(force, tmp_path / "log")[0] == 0
    assert load_manifest(data).counts["read"] == N_STORIES


@pytest.mark.slow
def test_a_torn_shard_of_a_finished_range_is_written_again(source, uninterrupted, tmp_path):
    whole, n_changes = uninterrupted
    data = tmp_path / "data"
    run(words(source, data), tmp_path / "log", kill_at=round(0.5 * n_changes))
    torn = next(iter(data.glob(".staging/*/train/*.parquet")))
    torn.write_bytes(torn.read_bytes()[:50])
    assert run(words(source, data), tmp_path / "log")[0] == 0
    assert contents(data) == whole


def fill_the_disk(argv: list[str], log: str, file_bytes: int) -> None:
    """In a process of its own: prepare where no file may become larger than that, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    prepare(argv, log)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(source, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    data, log = tmp_path / "data", tmp_path / "log"
    process = FORKSERVER.Process(target=fill_the_disk, args=(words(source, data), str(log), 6000))
    process.start()
    process.join()
    assert process.exitcode == 2
    assert log.read_text().splitlines()[-2] == f"error: cannot write to {data}: [Errno 27] File too large"
    assert not (data / manifest.MANIFEST).exists()
    assert not [path for path in data.rglob(".*") if path.is_file()]  # nothing half-written lies beside
    assert run(words(source, data), log)[0] == 0
    assert "skipping" in log.read_text()
    assert contents(data) == whole


def command(output: Path) -> list[str]:
    return [
        sys.executable, "pipelines/prepare.py", "--source", "sample", "--max-stories", "16000", "--output", str(output),
        "--direct_num_workers", "2", "--direct_running_mode", "multi_processing",
    ]  # fmt: skip


def children(pid: int) -> list[int]:
    found = list[int]()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += [int(child) for child in task.read_text().split()]
    return found + [below for child in found for below in children(child)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], deadline: float) -> None:
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stop(process: subprocess.Popen, workers: list[int]) -> None:
    """What is left of a job, by its ids."""
    for pid in [process.pid, *workers]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_once(tmp_path):
    """Sent to the whole group, as a terminal does, just when the worker processes begin."""
    data = tmp_path / "data"
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command(data), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        workers: list[int] = []
        try:
            deadline = time.monotonic() + 60
            while not list(data.glob(".staging/*/workers.log")):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.01)
            workers = children(process.pid)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=20) == 130
            wait_until_gone(workers, deadline)
        finally:
            stop(process, workers)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_a_process_that_is_killed_loses_nothing(tmp_path, victim):
    data = tmp_path / "data"
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(command(data), cwd=ROOT, stdout=log, stderr=log)
        workers: list[int] = []
        try:
            deadline = time.monotonic() + 120
            while not list(data.glob(f".staging/*/{cleaned_files.CLEANED}/*.arrow")):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.02)
            workers = children(process.pid)
            os.kill(process.pid if victim == "driver" else workers[-1], signal.SIGKILL)
            code = process.wait(timeout=60)
            wait_until_gone(workers, deadline)  # a worker without its driver ends by itself
        finally:
            stop(process, workers)
    if victim == "worker":
        assert code == 2
        assert "a worker process ended" in (tmp_path / "log").read_text().splitlines()[-1]
    assert not (data / manifest.MANIFEST).exists()

    again = subprocess.run(command(data), cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "prepare: continuing an interrupted job; skipping" in again.stderr
    assert load_manifest(data).counts["kept"] == 16_000


def test_what_somebody_put_beside_the_shards_is_never_removed(tmp_path, capsys):
    """--force replaced the whole folder `train`, whatever else lay in it."""
    from pipelines.prepare import main

    common = ["--runner", "DirectRunner", "--source", "sample", "--vocab-size", "300", "--output", str(tmp_path)]
    assert main([*common, "--max-stories", "20"]) == 0
    (tmp_path / "train" / "notes").mkdir()
    (tmp_path / "train" / "notes" / "mine.txt").write_text("mine")
    assert main([*common, "--max-stories", "21", "--force"]) == 2
    assert "holds train/notes, not written by this program" in capsys.readouterr().err
    assert (tmp_path / "train" / "notes" / "mine.txt").read_text() == "mine"
    assert load_manifest(tmp_path).counts["read"] == 20
    shutil.rmtree(tmp_path / "train" / "notes")
    (tmp_path / "train" / ".00000.parquet.77-0123abcd").write_bytes(b"left by a kill")
    assert main([*common, "--max-stories", "21", "--force"]) == 0

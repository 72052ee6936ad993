"""`infra/local_cluster.sh` without a Ray: what it reads, what it refuses, what it keeps, and whom it ends."""

import contextlib
import dataclasses
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra import local_cluster
from infra.cluster import answers, processes, state
from infra.cluster.parts import Layout
from infra.cluster.processes import MARK, PART, Part
from slm_ray.errors import UserError
from slm_ray.locks.process_identity import process_word
from tests.support.paths import ROOT

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
PARENT = [sys.executable, "-c", f"import subprocess, time; subprocess.Popen({SLEEP!r}); time.sleep(600)"]
DEAF = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); "
        "time.sleep(600)"]  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[state.State]:
    made = state.begin(tmp_path / "cluster", workers=2, cpus=1, base_port=26380)
    yield made
    processes.stop(made.parts, made.layout.mark, 1)
    state.end(made)


def started(made: state.State, command: list[str], name: str = "head") -> state.State:
    """The command as a part of the cluster, once it has said something or has a child."""
    log = made.layout.folder / "logs" / f"{name}.log"
    environment = os.environ | {MARK: made.layout.mark, PART: name}
    part = processes.start(name, "here", command, environment, ROOT, log)
    deadline = time.monotonic() + 60
    while not (log.read_text() or psutil.Process(part.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    made = dataclasses.replace(made, parts=(*made.parts, part))
    state.write(made)
    return made


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    "words",
    [
        [], ["start"], ["up", "--workers", "0"], ["up", "--workers", "10"], ["up", "--cpus", "x"],
        ["up", "--base-port", "80"], ["up", "--base-port", "65530"], ["up", "more"],
    ],
)  # fmt: skip
def test_what_is_no_command_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        local_cluster.main(words)
    assert end.value.code == 2
    assert "local_cluster.sh" in capsys.readouterr().err


def test_the_shell_script_hands_on_its_words(tmp_path: Path) -> None:
    script = ROOT / "infra" / "local_cluster.sh"
    done = subprocess.run(
        [script, "status", "--folder", tmp_path / "none"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, f"no cluster in {tmp_path / 'none'}\n"), done.stderr


def test_without_a_cluster_there_is_nothing_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local_cluster.main(["down", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no cluster in {tmp_path}\n"


def test_a_port_that_is_taken_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.3", 0)) as server:
        base = server.getsockname()[1] - 11  # that of the first worker's agent
        code = local_cluster.main(["up", "--folder", str(tmp_path / "new"), "--base-port", str(base)])
    assert code == 2
    assert f"port {base + 11} at 127.0.0.3 is in use: take others with --base-port" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_up_twice_says_so(begun: state.State, capsys: pytest.CaptureFixture[str]) -> None:
    begun = started(begun, SLEEP)
    assert local_cluster.main(["up", "--folder", str(begun.layout.folder)]) == 2
    assert "already: look at `status`, or end it with `down`" in capsys.readouterr().err
    with pytest.raises(UserError, match="already"):  # as the second of two at once
        state.begin(begun.layout.folder, workers=1, cpus=1, base_port=26380)


def test_up_after_the_machine_was_restarted_says_what_clears_away(
    begun: state.State, capsys: pytest.CaptureFixture[str]
) -> None:
    state.write(dataclasses.replace(begun, parts=(Part("head", 1, "this 0-0/1 1 1", "127.0.0.2"),)))
    assert local_cluster.main(["up", "--folder", str(begun.layout.folder)]) == 2
    assert "has ended (the machine was restarted?): `down` clears it away, then `up`" in capsys.readouterr().err
    assert local_cluster.main(["down", "--folder", str(begun.layout.folder)]) == 0
    assert "MLflow's records are gone" in capsys.readouterr().out


def test_a_copied_folder_ends_nobody_s_cluster(
    begun: state.State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = started(begun, SLEEP)
    copy = shutil.copytree(made.layout.folder, tmp_path / "copy")
    for word in ("status", "down", "up", "restart-head"):
        assert local_cluster.main([word, "--folder", str(copy)]) == 2
        assert f"is a copy: the cluster is that of --folder {made.layout.folder}; remove" in capsys.readouterr().err
    assert alive(made.parts[0].pid)
    link = tmp_path / "link"
    link.symlink_to(made.layout.folder)
    assert local_cluster.main(["down", "--folder", str(link)]) == 0
    assert local_cluster.main(["down", "--folder", str(copy)]) == 0, "what it was a copy of is no more"
    assert {path.name for path in copy.iterdir()} == {"logs"}


def test_a_cluster_whose_folder_was_moved_can_be_ended(begun: state.State, tmp_path: Path) -> None:
    made = started(begun, SLEEP)
    moved = made.layout.folder.rename(tmp_path / "moved")
    assert local_cluster.main(["down", "--folder", str(moved)]) == 0
    assert not alive(made.parts[0].pid) and {path.name for path in moved.iterdir()} == {"logs"}


def test_a_folder_that_holds_other_things_is_refused_and_left(tmp_path: Path) -> None:
    """What a cluster calls `mlflow` or `token` there might be somebody's, and would go with the cluster."""
    kept = tmp_path / "mlflow" / "years.db"
    kept.parent.mkdir()
    kept.write_text("of work")
    with pytest.raises(UserError, match="holds mlflow already: a cluster needs a folder of its own, see --folder"):
        state.begin(tmp_path, workers=1, cpus=1, base_port=26380)
    assert kept.read_text() == "of work" and [path.name for path in tmp_path.iterdir()] == ["mlflow"]


def test_nobody_else_reads_the_token_or_the_state(begun: state.State) -> None:
    folder = begun.layout.folder
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(begun.layout.ray_folder.stat().st_mode) == 0o700
    for name in ("token", "state.json", "environment"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
    token = (folder / "token").read_text()
    assert len(token) == 64
    everywhere = [*begun.layout.commands(), *begun.layout.command("head"), local_cluster.described(begun)]
    assert not any(token in text for text in [*everywhere, (folder / "environment").read_text()])


def test_the_state_is_read_as_it_was_written(begun: state.State) -> None:
    made = dataclasses.replace(begun, parts=(Part("head", 1, "word", "127.0.0.2"),))
    state.write(made)
    assert state.read(made.layout.folder) == made
    state.write(begun)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 9}', '{"format": 1, "layout": {}, "parts": [{}]}'])
def test_a_state_that_is_none_is_one_clear_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state.json").write_text(content)
    for word in ("status", "down", "up"):
        assert local_cluster.main([word, "--folder", str(tmp_path)]) == 2
        assert "is no state of a cluster" in capsys.readouterr().err


def test_every_node_has_an_address_and_every_listener_a_port_of_its_own(tmp_path: Path) -> None:
    layout = Layout(folder=tmp_path, ray_folder=tmp_path, mark="m", workers=9)
    ports = list(layout.ports())
    assert len({port for _, port in ports}) == len(ports)
    assert len({layout.address(node) for node in layout.nodes}) == 10
    assert "--num-cpus=0" in layout.command("head") and f"--address={layout.gcs}" in layout.command("worker-9")


def test_a_node_sees_no_cluster_or_store_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "AWS_PROFILE", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "elsewhere")
    layout = Layout(folder=tmp_path, ray_folder=tmp_path, mark="m")
    caches = {layout.environment(node).get("XDG_CACHE_HOME") for node in layout.nodes}
    assert len(caches) == 3
    own = layout.environment("worker-1")
    assert "elsewhere" not in own.values()
    assert (own["AWS_ENDPOINT_URL"], own["MLFLOW_TRACKING_URI"]) == (layout.store, layout.mlflow)


def test_down_ends_what_was_started_with_all_below_it(begun: state.State, capsys: pytest.CaptureFixture[str]) -> None:
    made = started(started(begun, PARENT), SLEEP, "store")
    family = [part.pid for part in made.parts]
    family += [child.pid for child in psutil.Process(made.parts[0].pid).children()]
    assert len(family) == 3
    assert local_cluster.main(["down", "--folder", str(made.layout.folder)]) == 0
    assert not any(alive(pid) for pid in family)
    assert not made.layout.ray_folder.exists()
    assert {path.name for path in made.layout.folder.iterdir()} == {"logs"}
    assert "gone" in capsys.readouterr().out


def test_a_part_is_lost_with_what_no_longer_has_it_for_a_parent(begun: state.State) -> None:
    made = started(begun, PARENT)
    (orphan,) = psutil.Process(made.parts[0].pid).children()
    psutil.Process(made.parts[0].pid).kill()
    of_another = started(made, SLEEP, "worker-1").parts[1]
    processes.lose(made.parts[0], made.layout.mark)
    assert alive(of_another.pid) and not alive(orphan.pid)
    processes.lose(of_another, made.layout.mark)
    assert not alive(of_another.pid)


def test_what_does_not_listen_is_killed(begun: state.State) -> None:
    made = started(begun, DEAF)
    assert processes.stop(made.parts, made.layout.mark, grace_s=0.5) == []
    assert not alive(made.parts[0].pid)


def test_a_number_that_is_anothers_by_now_is_left_alone(begun: state.State) -> None:
    """The process of the cluster has ended, and the system has given its number to somebody."""
    with subprocess.Popen(SLEEP, stdout=subprocess.DEVNULL) as stranger:
        words = process_word(stranger.pid).split(" ")
        earlier = " ".join([*words[:3], str(int(words[3]) - 1)])
        part = Part("head", stranger.pid, earlier, "here")
        state.write(dataclasses.replace(begun, parts=(part,)))
        assert processes.find(part) is None
        assert local_cluster.main(["status", "--folder", str(begun.layout.folder)]) == 1
        assert local_cluster.main(["down", "--folder", str(begun.layout.folder)]) == 0
        is_alive = stranger.poll() is None
        stranger.kill()
    assert is_alive


def test_what_lost_its_parent_is_found_by_its_mark(begun: state.State) -> None:
    """`up` was killed before it noted the process, or a part died and left others behind."""
    made = started(begun, PARENT)
    (orphan,) = psutil.Process(made.parts[0].pid).children()
    psutil.Process(made.parts[0].pid).kill()
    with subprocess.Popen(SLEEP, env=os.environ | {MARK: "another"}, stdout=subprocess.DEVNULL) as stranger:
        assert processes.stop((), made.layout.mark, grace_s=5) == []
        is_alive = stranger.poll() is None
        stranger.kill()
    assert is_alive and not alive(orphan.pid)


def test_an_up_that_fails_ends_what_it_began_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    def command(self: Layout, part: str) -> list[str]:
        return SLEEP if part == "store" else [sys.executable, "-c", f"raise SystemExit('no {part} today')"]

    def start(name: str, *rest: object) -> Part:
        pids.append((part := begin(name, *rest)).pid)  # type: ignore[arg-type]
        return part

    begin = processes.start
    monkeypatch.setattr(Layout, "command", command)
    monkeypatch.setattr(processes, "start", start)
    base = "27380"  # below those that the system gives to whoever asks for any
    assert local_cluster.main(["up", "--folder", str(tmp_path / "c"), "--base-port", base]) == 2
    said = capsys.readouterr().err
    assert "mlflow ended: no mlflow today (all of it in" in said or "head ended: no head today (all of it in" in said
    assert len(pids) == 3 and not any(alive(pid) for pid in pids)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"logs"}


def test_a_part_that_hangs_is_said_to_be_there_and_not_to_answer(
    begun: state.State, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "alive_nodes", lambda _: {"127.0.0.3"})
    monkeypatch.setattr(answers, "has_store", lambda _: True)
    monkeypatch.setattr(answers, "is_well", lambda *_: True)
    made = started(started(started(begun, SLEEP), SLEEP, "worker-1"), SLEEP, "store")
    assert local_cluster.main(["status", "--folder", str(made.layout.folder)]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["store", "mlflow", "head", "worker-1", "worker-2"]
    assert [" ".join(line[1:3]) for line in lines] == [
        "answers pid", "never started", "does not", "answers pid", "never started"
    ]  # fmt: skip


def test_a_restarted_head_is_another_process_and_what_has_ended_is_started_too(
    begun: state.State, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "command", lambda *_: SLEEP)
    monkeypatch.setattr(answers, "answers", lambda *_: True)
    made = begun
    for name in ("head", "store", "mlflow", "worker-1", "worker-2"):
        made = started(made, SLEEP, name)
    before = {part.name: part.pid for part in made.parts}
    processes.lose(made.parts[4], made.layout.mark)
    assert local_cluster.main(["restart-head", "--folder", str(made.layout.folder)]) == 0
    after = state.read(made.layout.folder)
    assert after is not None
    assert {part.name for part in after.parts if part.pid != before[part.name]} == {"head", "worker-2"}
    assert len(after.parts) == 5 and all(alive(part.pid) for part in after.parts)
    assert not alive(before["head"])
    assert "jobs go on with --resume" in capsys.readouterr().out
    processes.stop(after.parts, after.layout.mark)


def test_a_head_is_not_restarted_where_its_jobs_would_find_nothing(
    begun: state.State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local_cluster.main(["restart-head", "--folder", str(tmp_path / "none")]) == 2
    assert "no cluster in" in capsys.readouterr().err
    made = started(started(begun, SLEEP, "head"), SLEEP, "store")
    processes.lose(made.parts[1], made.layout.mark)
    assert local_cluster.main(["restart-head", "--folder", str(made.layout.folder)]) == 2
    assert "the object store has ended, and all that lay in it: `down`, then `up`" in capsys.readouterr().err
    assert alive(made.parts[0].pid)


def test_a_head_alone_keeps_its_record_on_its_disk(tmp_path: Path) -> None:
    layout = Layout(folder=tmp_path, ray_folder=tmp_path, mark="m")
    kept = {name: layout.environment(name).get("RAY_gcs_storage_path") for name in layout.names}
    assert kept == dict.fromkeys(layout.names) | {"head": f"{tmp_path}/head-gcs"}

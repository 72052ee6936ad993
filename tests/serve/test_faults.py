"""What a server of two replicas promises while processes die, versions change and it is stopped: one start of Ray."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from slm_ray.tracking import mlflow_runs
from tests.support.champions import register_champion
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.tiny_model import write_endless_model

WITHIN_S = 120.0
SHORT = {"prompt": "The cat", "max_tokens": 20, "temperature": 1, "seed": 1}
LONG = {"prompt": "The cat", "max_tokens": 2000, "seed": 1}
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass
class Server:
    """The command, running."""

    process: subprocess.Popen[str]
    url: str
    uri: str
    run_id: str
    folder: Path
    lines: "queue.Queue[str]" = field(default_factory=queue.Queue)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}/generate", json=body, timeout=WITHIN_S)

    def version(self) -> str:
        return str(httpx.get(f"{self.url}/model", timeout=WITHIN_S).json()["version"])

    def replicas(self) -> list[psutil.Process]:
        """Processes of this server alone."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if is_replica(child)]

    def line(self, containing: str) -> str:
        """The next line of its output with these words."""
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            line = self.lines.get(timeout=WITHIN_S)
            if containing in line:
                return line
        raise AssertionError(f"no line says {containing!r}")


def is_replica(process: psutil.Process) -> bool:
    try:
        return any("ServeReplica" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("faults"), "--replicas 2 --rows 4") as server:
        yield server


@contextlib.contextmanager
def started(folder: Path, options: str, **environment: str) -> Iterator[Server]:
    """The command with a registered model, until the block is left."""
    uri, port = f"sqlite:///{folder / 'mlflow.db'}", free_port()
    run_id = mlflow_runs.start_run(uri, "tests", "faults", {}).run_id
    register_champion(uri, "tiny", write_endless_model(folder / "v1", seed=1), run_id)
    options += f" --model models:/tiny@champion --tracking-uri {uri} --port {port}"
    options += " --watch-interval-s 0.5 --drain-s 60"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "serve" / "app.py"), *options.split()],
        cwd=folder,
        env=os.environ | {"RAY_ADDRESS": "local"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    server = Server(process, f"http://127.0.0.1:{port}", uri, run_id, folder)
    reader = threading.Thread(target=read_lines, args=[server])
    reader.start()
    children: list[psutil.Process] = []
    try:
        server.line("serving tiny 1 at")
        children = psutil.Process(process.pid).children(recursive=True)
        yield server
    finally:
        for left in (*children, *([psutil.Process(process.pid)] if process.poll() is None else [])):
            if left.is_running():
                left.kill()
        reader.join(WITHIN_S)
        process.communicate()


def read_lines(server: Server) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.put(line)


class Load:
    """Clients that ask for one short story after another, until the block is left."""

    def __init__(self, server: Server, clients: int = 6) -> None:
        self.answers: list[httpx.Response | httpx.TransportError] = []
        self._server = server
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        with httpx.Client(timeout=WITHIN_S) as client:
            while not self._is_over.is_set():
                try:
                    self.answers.append(client.post(f"{self._server.url}/generate", json=SHORT))
                except httpx.TransportError as error:
                    self.answers.append(error)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count: int) -> None:
        before = len(self.answers)
        wait_for(lambda: len(self.answers) >= before + count)

    @property
    def failures(self) -> list[httpx.Response | httpx.TransportError]:
        return [
            answer for answer in self.answers if not isinstance(answer, httpx.Response) or answer.status_code != 200
        ]


def test_no_request_fails_while_the_alias_moves_and_every_replica_follows(server: Server) -> None:
    with Load(server) as load:
        load.wait_for_more(20)
        register_champion(server.uri, "tiny", write_endless_model(server.folder / "v2", seed=2), server.run_id)
        replicas = {server.line("tiny 2 took over from tiny 1").split()[1] for _ in range(2)}
        start = len(load.answers)
        load.wait_for_more(40)
    assert load.failures == []
    assert len(replicas) == 2
    stories: dict[str, set[str]] = {}
    for answer in load.answers:
        assert isinstance(answer, httpx.Response)
        stories.setdefault(answer.json()["model"]["version"], set()).add(answer.json()["story"])
    assert stories.keys() == {"1", "2"} and all(len(alike) == 1 for alike in stories.values())
    newest = {a.json()["model"]["version"] for a in load.answers[start + 12 :] if isinstance(a, httpx.Response)}
    assert newest == {"2"}
    wait_for(lambda: deployments(server) == {("models:/tiny/1", "FINISHED"): 2, ("models:/tiny/2", "RUNNING"): 2})


def deployments(server: Server) -> dict[tuple[str, str], int]:
    """What MLflow shows: how many replicas serve, or served, each version."""
    store = mlflow_runs.client(server.uri)
    home = store.get_run(server.run_id).info.experiment_id
    found = store.search_runs([home], "tags.`slm_ray.kind` = 'deployment'")
    return Counter((run.data.tags["model_version"], run.info.status) for run in found)


def assert_slots_are_free_after(leave: Callable[[], None], server: Server) -> None:
    """Forty clients at once do it, and the next story is written at once."""
    threads = [threading.Thread(target=leave) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    start = time.monotonic()
    assert server.post(SHORT).status_code == 200
    assert time.monotonic() - start < 5


def test_clients_that_leave_free_their_slots(server: Server) -> None:
    """Forty stories of 2,000 tokens would hold the eight slots for longer than a short one waits."""

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/generate", json=LONG, timeout=0.5)

    assert_slots_are_free_after(leave, server)


def test_a_story_arrives_while_it_is_written(server: Server) -> None:
    assert_story_arrives(server)


def assert_story_arrives(server: Server) -> None:
    began, arrived, events = time.monotonic(), [], []
    with httpx.stream("POST", f"{server.url}/generate", json=LONG | {"stream": True}, timeout=WITHIN_S) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                arrived.append(time.monotonic() - began)
                events.append(json.loads(line.removeprefix("data: ")))
    assert len(events) > 20 and events[-1]["done"] and events[-1]["usage"]["completion_tokens"] == 2000
    assert arrived[0] < arrived[-1] / 2
    whole = server.post(LONG).json()["story"]
    assert LONG["prompt"] + "".join(event["text"] for event in events[:-1]) == whole


def test_clients_that_leave_in_the_middle_of_a_story_free_their_slots(server: Server) -> None:
    def leave() -> None:
        with httpx.stream("POST", f"{server.url}/generate", json=LONG | {"stream": True}, timeout=WITHIN_S) as answer:
            assert next(answer.iter_lines()).startswith("data: ")

    assert_slots_are_free_after(leave, server)


def test_many_at_once_are_written_whole_or_asked_to_retry(server: Server) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=300), timeout=WITHIN_S) as client:
            return await asyncio.gather(*(client.post(f"{server.url}/generate", json=SHORT) for _ in range(300)))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} <= {200, 429}
    assert len({answer.json()["story"] for answer in answers if answer.status_code == 200}) == 1
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)


def test_health_does_not_stand_behind_bodies_that_do_not_arrive(server: Server) -> None:
    address = ("127.0.0.1", httpx.URL(server.url).port or 0)
    head = (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(160):
            stack.enter_context(socket.create_connection(address)).sendall(head)
        for _ in range(10):
            for path in ("/health", "/ready", "/-/healthz"):
                assert httpx.get(f"{server.url}{path}", timeout=5).status_code == 200
    wait_for(lambda: server.post(SHORT).status_code == 200)


def test_heads_and_silence_are_bounded(server: Server) -> None:
    assert_bounds(server)


def assert_bounds(server: Server) -> None:
    """Ray's own proxy reads 64 MiB of header, for 5.5 s and 334 MB, and keeps a socket that says nothing."""
    address = ("127.0.0.1", httpx.URL(server.url).port or 0)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(50)]
        large = stack.enter_context(socket.create_connection(address))
        with contextlib.suppress(ConnectionError):
            large.sendall(b"GET /health HTTP/1.1\r\nX: ")
            for _ in range(64):
                large.sendall(b"x" * 2**20)
            pytest.fail("it read 64 MiB of header")
        for one in silent:
            one.settimeout(WITHIN_S)
            assert one.recv(1) == b""


def test_a_killed_replica_harms_only_its_own_clients_and_comes_back(server: Server) -> None:
    doomed, other = server.replicas()
    version = server.version()
    with Load(server) as load:
        load.wait_for_more(20)
        os.kill(doomed.pid, signal.SIGKILL)  # the server's own replica, by its own id
        load.wait_for_more(100)
        server.line("is gone")
        server.line(f"serves tiny {version}")
        before = len(load.answers)
        load.wait_for_more(100)
        late = load.answers[before + 6 :]
    statuses = [a.status_code if isinstance(a, httpx.Response) else repr(a) for a in load.failures]
    assert len(statuses) <= 6  # at most what each client had under way
    assert all(status in (500, 503) for status in statuses)
    assert {process.pid for process in server.replicas()} > {other.pid}
    assert all(isinstance(answer, httpx.Response) and answer.status_code == 200 for answer in late)
    assert {a.json()["model"]["version"] for a in late if isinstance(a, httpx.Response)} == {version}


def test_on_sigterm_running_stories_finish_and_new_ones_are_refused(server: Server) -> None:
    """Six clients ask for story after story until they are refused: some run whenever the signal comes."""
    finished: list[bool] = []
    refused: list[int] = []
    begun = threading.Semaphore(0)
    body = LONG | {"stream": True}

    def ask_again_and_again() -> None:
        with contextlib.suppress(httpx.TransportError):
            while True:
                with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=WITHIN_S) as answer:
                    if answer.status_code != 200:
                        refused.append(answer.status_code)
                        return
                    finished.append(comes_whole(answer, begun))

    threads = [threading.Thread(target=ask_again_and_again) for _ in range(6)]
    for thread in threads:
        thread.start()
    assert all(begun.acquire(timeout=WITHIN_S) for _ in threads)
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(WITHIN_S)
    assert not any(thread.is_alive() for thread in threads)
    assert len(finished) >= 6 and all(finished)
    assert set(refused) == {503}
    assert server.process.wait(WITHIN_S) == 0
    assert server.process.stderr is not None and server.process.stderr.read() == ""
    assert psutil.wait_procs(children, timeout=30)[1] == []


def comes_whole(answer: httpx.Response, begun: threading.Semaphore) -> bool:
    """Whether a story comes to its end; `begun` is released when its first chunk is here."""
    lines = filter(None, answer.iter_lines())
    try:
        chunks = [next(lines)]
        begun.release()
        chunks += lines
    except httpx.TransportError:
        return False
    return bool(json.loads(chunks[-1].removeprefix("data: ")).get("done"))


def test_one_more_replica_starts_when_the_slots_are_all_in_use(tmp_path: Path) -> None:
    with started(tmp_path, "--replicas 1 --max-replicas 2 --rows 2") as server:
        first = server.line("serves tiny 1").split()[1]
        with Load(server, clients=6) as load:
            second = server.line("serves tiny 1").split()[1]
            load.wait_for_more(20)
        assert first != second
        assert load.failures == []


def test_replicas_that_answer_by_themselves_keep_the_same_promises(tmp_path: Path) -> None:
    with started(tmp_path, "--replicas 2 --rows 4 --ingress direct") as server:
        assert httpx.get(f"{server.url}/-/healthz", timeout=WITHIN_S).text == "success"
        assert_story_arrives(server)
        assert_bounds(server)
        with Load(server) as load:
            load.wait_for_more(20)
            os.kill(server.replicas()[0].pid, signal.SIGKILL)  # the server's own replica, by its own id
            load.wait_for_more(100)
            server.line("is gone")
            server.line("serves tiny 1")
            load.wait_for_more(100)
        assert len(load.failures) <= 6  # at most what each client had under way: their connections end
        assert all(isinstance(failure, httpx.TransportError) for failure in load.failures)

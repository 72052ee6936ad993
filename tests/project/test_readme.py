"""Every command and every Python block of the READMEs and pages, as it stands, in a folder like a fresh checkout.

They run in the order of `ORDER`, so that each finds what those before it made: one small data set of "your own corpus",
and one of 150 stories that a stand-in of the hub has in place of TinyStories. A command that stands on several pages
runs once. What cannot run here is listed by name, with the reason or with the test that runs it.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm_ray.corpus.grammar import sample_stories
from tests.project.test_monitoring import metrics_about, sample_names
from tests.project.test_seeds import COMMANDS, is_known, options_of
from tests.support import hub_stand_in
from tests.support.pages import PAGES, Command, commands, spans
from tests.support.paths import ROOT
from tests.support.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SERVED = (  # one run of the server answers the first four, another the fifth
    "infra/docs/guides/own-corpus.md",
    "serve/README.md",
    "README.md",
    "infra/README.md",
    "infra/docs/guides/serving-in-production.md",
)
ORDER = (
    *SERVED,
    "infra/docs/guides/reading-a-report.md",
    "infra/docs/guides/sweeps-and-promotion.md",
    "infra/docs/guides/scaling-out.md",
    "infra/docs/guides/python.md",
)
CHECKOUT = ("pipelines", "slm_ray", "tune", "serve", "infra", "tests", "pyproject.toml", "constraints.txt", "Makefile")
ADDRESS, METRICS = "127.0.0.1:8000", "127.0.0.1:8080"
RUNNING_CLUSTER = "needs a cluster that runs: test_pages.py hands its file to Ray's schema and to the application"
DOCKER, KIND, CLUSTER = "needs Docker", "needs Docker and kind", "needs a cluster, an account or Java"
BY_HAND = "changes this environment or checkout: .ci/run begins with it"
PART_OF_THIS = "are tests that `make test` runs beside this one"
RAY_STOP = "`ray stop` ends every Ray of the machine, those of other tests too: "
LOCAL_CLUSTER = "starts several Ray nodes: test_local_cluster_run.py does it, small"
BY_HAND_THERE = "needs the local cluster, and minutes there: done by hand"
LEFT_OUT = {
    "infra/local_cluster.sh up": LOCAL_CLUSTER,
    "source .cluster/environment": LOCAL_CLUSTER,
    "infra/local_cluster.sh status": LOCAL_CLUSTER,
    "infra/local_cluster.sh restart-head": LOCAL_CLUSTER,
    "infra/local_cluster.sh down": LOCAL_CLUSTER,
    "git clone <this repository> slm-ray && cd slm-ray": "needs the network",
    "make setup": BY_HAND,
    "source .venv/bin/activate": "the tests run in that environment",
    "make test": "is what runs this",
    "python -m pytest -q tests/model/test_rms_norm.py": PART_OF_THIS,
    "python -m pytest -q tests/sources -k compressed": PART_OF_THIS,
    'python -m pytest -q -m "not ray"': PART_OF_THIS,
    "make lint test": "is what runs this",
    "pre-commit install": "writes into .git",
    "docker compose -f infra/compose.yaml up --build": DOCKER,
    'key="$(docker compose -f infra/compose.yaml exec serve cat /keys/api-keys)"': DOCKER,
    "docker build -f infra/Dockerfile --target train -t slm-ray-train:local .": DOCKER,
    "docker build -f infra/Dockerfile --target serve -t slm-ray-serve:local .": DOCKER,
    "kind create cluster --name slm-ray": KIND,
    "kind load docker-image --name slm-ray slm-ray-train:local slm-ray-serve:local": KIND,
    "kind delete cluster --name slm-ray": KIND,
    "helm repo add kuberay https://ray-project.github.io/kuberay-helm/": "needs the network",
    "export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0": RAY_STOP + "with the next ones",
    "ray get-auth-token --generate && chmod 600 ~/.ray/auth_token": "writes into the home of who runs the tests",
    "ray stop": RAY_STOP + "left out",
    "serve deploy stories.yaml": RUNNING_CLUSTER,
    "serve status": RUNNING_CLUSTER,
    "serve shutdown --yes": RUNNING_CLUSTER,
    "SLM_METRICS_PORT=8080 python serve/app.py": "serving-in-production.md starts one with that port, and keys",
}
LEFT_OUT_BEGIN = {  # what the command begins with
    "ray job submit -- python pipelines/prepare.py --runner DirectRunner --source stories": LOCAL_CLUSTER,
    "ray job submit -- python tune/sweep.py --data s3://": BY_HAND_THERE,
    "ray job submit --no-wait -- python serve/app.py": BY_HAND_THERE,
    "python tests/bench/learning/learn.py --device cuda": "needs a GPU",
    "kubectl ": KIND,
    "helm install ": KIND,
    'curl -s http://127.0.0.1:8000/generate -H "Authorization: Bearer $key"': DOCKER,
    "python pipelines/prepare.py --runner FlinkRunner": CLUSTER,
    "python pipelines/prepare.py --runner SparkRunner": CLUSTER,
    "python pipelines/prepare.py --runner DataflowRunner": CLUSTER,
    "python slm_ray/train.py --init-from hub:OWNER/NAME": "names a model of the hub: test_begun_from.py",
}
ELSEWHERE = {
    "make demo": "project/test_end_to_end.py::test_from_stories_to_an_answer_over_http",
    "python tune/sweep.py": "tune/test_sweep.py::test_a_sweep_trains_the_best_point_and_goes_on_where_it_stopped",
    "python tune/sweep.py --lr 1e-3 3e-3 --d-ff 512 704 --trial-steps 100 --no-final":
        "tune/test_sweep.py::test_a_sweep_trains_the_best_point_and_goes_on_where_it_stopped",
    "python tune/sweep.py --lr 3e-4 1e-3 3e-3 --d-ff 512 704 1024 --scheduler asha":
        "tune/test_rounds.py::test_nine_trials_become_three_and_one_and_most_steps_are_saved",
    "python tune/sweep.py --space space.yaml --search optuna --num-trials 24 --scheduler asha":
        "tune/test_rounds.py::test_a_sweep_that_is_killed_anywhere_and_goes_on_ends_with_the_same_table",
    "python slm_ray/train.py --data data/tinystories --teacher runs/first/best runs/second/best --teacher-weight 0.5":
        "training/test_teachers.py::test_a_run_with_a_teacher_resumes_bit_for_bit_and_learns_what_it_thinks",
    "python slm_ray/train.py --resume --name NAME":
        "distributed/test_driver.py::test_two_workers_train_register_and_resume",
    "python slm_ray/evaluate.py --model models:/tinystories/3 --data data/tinystories --promote":
        "evaluation/test_promotion.py::test_a_trained_model_takes_the_place_of_an_untrained_one_and_gives_it_back",
    "python pipelines/prepare.py --runner DirectRunner --source 'stories/*.jsonl.gz' --output data/mine "
    "--near-duplicates 0.8": "pipelines/test_prepare.py::test_near_duplicates_are_told_apart_from_equal_stories",
    "python -m apache_beam.runners.portability.local_job_service_main -p 8099":
        "pipelines/test_runners.py::test_a_portable_runner_gives_the_same_bytes_and_leaves_nothing",
    "python pipelines/prepare.py --runner PortableRunner --job_endpoint localhost:8099 --environment_type LOOPBACK":
        "pipelines/test_runners.py::test_a_portable_runner_gives_the_same_bytes_and_leaves_nothing",
    "ray start --head":
        "distributed/test_job.py::test_a_submitted_job_trains_and_its_head_listens_on_loopback_only",
    "ray job submit -- python slm_ray/train.py":
        "distributed/test_job.py::test_a_submitted_job_trains_and_its_head_listens_on_loopback_only",
    "import sys": "exports/test_readme.py::test_thirty_lines_write_torch_s_story",
}  # fmt: skip
"""Commands, or the first line of a program, and the test that runs them with smaller sizes or in other words."""
WITH_A_PROXY = {"ray_serve_deployment_queued_queries"}
"""Where replicas answer by themselves no proxy of Ray's has a queue."""
BEAMS_OWN = re.compile("--(runner|project|region|[a-z]+(_[a-z]+)+)")
"""Options that prepare.py hands on to Beam."""


def in_order() -> list[Command]:
    """Every command once."""
    found: dict[str, Command] = {}
    pages = [ROOT / page for page in ORDER]
    for page in [*pages, *(page for page in PAGES if page not in pages)]:
        for command in commands(page):
            found.setdefault(command.text, command)
    return list(found.values())


ALL = in_order()


def why_not(command: Command) -> str | None:
    """The reason or the test of a command that does not run here; None of one that does."""
    if command.kind == "python":
        return ELSEWHERE.get(command.text.splitlines()[0])
    begun = [reason for begin, reason in LEFT_OUT_BEGIN.items() if command.text.startswith(begin)]
    kind = command.page == "infra/k8s/README.md" and KIND
    return LEFT_OUT.get(command.text) or ELSEWHERE.get(command.text) or (begun[0] if begun else kind or None)


class Checkout:
    """A folder like a fresh checkout, the hub beside it, and the server that a page started."""

    def __init__(self, folder: Path, hub: str) -> None:
        self.folder = folder
        self.ports = {port: port if _is_free(port) else free_port() for port in (8000, 8080)}
        self._server: tuple[str, subprocess.Popen[bytes]] | None = None
        for name in CHECKOUT:
            (folder / name).symlink_to(ROOT / name)
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub,
            "HF_HOME": str(folder / "hub-cache"),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, command: Command) -> None:
        """Run it as it stands, but for a port that somebody else has."""
        text = command.text
        for stated, port in self.ports.items():
            text = text.replace(f"127.0.0.1:{stated}", f"127.0.0.1:{port}").replace(
                f"_PORT={stated} ", f"_PORT={port} "
            )
        if "serve/app.py" in text:
            self.serve(text)
            return
        words = [sys.executable, "-c", text] if command.kind == "python" else ["bash", "-c", text]
        deadline = time.monotonic() + (60 if METRICS in text else 0)
        while True:
            done = subprocess.run(
                words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False
            )
            if done.returncode == 0 or time.monotonic() > deadline:  # Ray's figures are some seconds old
                break
            time.sleep(0.5)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert not re.search(r"Traceback|deprecat", done.stderr, re.IGNORECASE), done.stderr[-2000:]
        if METRICS in text:
            wanted = metrics_about("serving") - WITH_A_PROXY
            while (missing := wanted - self.scraped()) and time.monotonic() < deadline:
                time.sleep(0.5)
            assert missing == set()
        if text.startswith("curl "):
            assert done.stdout and '"error"' not in done.stdout, done.stdout

    def scraped(self) -> set[str]:
        """What Prometheus would find at the port of the server's Ray."""
        return sample_names(httpx.get(f"http://127.0.0.1:{self.ports[8080]}/metrics", timeout=30).text)

    def serve(self, text: str) -> None:
        """Start a server in the background, in place of another one, and wait until it answers."""
        self.stop()
        port = self.ports[8000]
        text = text if port == 8000 else f"{text} --port {port}"
        with (self.folder / "server.log").open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec env {text}"],
                cwd=self.folder, env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._server = text, process
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        pytest.fail("the server did not answer")

    def stop(self) -> None:
        """End the server as Ctrl-C does."""
        if self._server is None:
            return
        text, process = self._server
        self._server = None
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            for child in psutil.wait_procs(children, timeout=20)[1]:
                child.kill()
        assert process.returncode in (0, 130), text


def parquet(start: int, stop: int) -> bytes:
    """A file of stories of the sample corpus."""
    content = io.BytesIO()
    pq.write_table(pa.table({"text": list(sample_stories(start, stop))}), content)
    return content.getvalue()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    files = {"data/train.parquet": parquet(0, 150), "data/validation.parquet": parquet(300, 312)}
    with hub_stand_in.running({"roneneldan/TinyStories": {"main": files}}) as hub:
        made = Checkout(tmp_path_factory.mktemp("checkout"), hub.endpoint)
        yield made
        made.stop()


@pytest.mark.parametrize("command", [one for one in ALL if why_not(one) is None], ids=str)
def test_a_command_of_a_page_runs(command: Command, checkout: Checkout) -> None:
    if command.page not in SERVED:
        checkout.stop()
    checkout.run(command)


def test_what_is_listed_stands_on_a_page() -> None:
    listed = [*LEFT_OUT, *(command for command in ELSEWHERE if " " in command)]
    texts = [command.text for command in ALL]
    firsts = [text.splitlines()[0] for text in texts]
    assert [text for text in listed if text not in texts + firsts] == []
    assert [begin for begin in LEFT_OUT_BEGIN if not any(text.startswith(begin) for text in texts)] == []
    assert sum(why_not(command) is None for command in ALL) > 25


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_what_runs_elsewhere_has_its_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert name.startswith("test_")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_that_a_page_names_are_those_of_its_script(page: Path) -> None:
    code = [*spans(page), *(command.text for command in commands(page) if command.kind == "sh")]
    named = {pair for span in code if " " in span for pair in options_of(f"`{span}`") if pair[0] in COMMANDS}
    own = {pair for pair in named if pair[0] != "pipelines/prepare.py" or not BEAMS_OWN.fullmatch(pair[1])}
    assert {(script, option) for script, option in own if not is_known(script, option)} == set()


def _is_free(port: int) -> bool:
    return not any(one.laddr.port == port for one in psutil.net_connections() if one.status == psutil.CONN_LISTEN)

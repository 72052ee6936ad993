"""How one version of a model takes the place of another while it serves, without Ray."""

import asyncio
import gc
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import safetensors.torch
import torch

from serve.models.loaded_model import LoadedModel
from serve.models.rollout import AliasWatch, Rollout, start_rollout
from slm_ray.errors import UserError
from slm_ray.generation.engine import Engine
from slm_ray.generation.engine_thread import EngineBusyError, EngineClosedError
from slm_ray.generation.request import Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs import checkpoint, run_folder, verification
from slm_ray.tracking import mlflow_runs, registry
from tests.support.champions import register_champion
from tests.support.tiny_model import write_endless_model

STORY = SamplingParams(max_tokens=12, temperature=1, seed=1)
LONG = SamplingParams(max_tokens=2000, seed=1)
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four checkpoints that write different stories."""
    folder = tmp_path_factory.mktemp("versions")
    return [write_endless_model(folder / f"v{seed}", seed=seed) for seed in range(4)]


def broken_copy(source: Path, target: Path, value: float) -> Path:
    """A complete checkpoint, digests and all, whose weights are useless."""
    partial = target.with_name(f"{target.name}.raw")
    shutil.copytree(source, partial)
    weights = partial / "model" / "model.safetensors"
    tensors = {name: torch.full_like(tensor, value) for name, tensor in safetensors.torch.load_file(weights).items()}
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    (partial / verification.MARKER).unlink()
    checkpoint.commit_partial(partial, target)
    return target


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Served:
    """A rollout that watches a link to one of the versions."""

    def __init__(self, folder: Path, first: Path, rows: int = 4, max_waiting: int = 64) -> None:
        self.link = folder / "best"
        self.move(first)
        self.rollout = start_rollout(
            str(self.link), "", 1, max_slots=rows, max_waiting=max_waiting, watch_interval_s=0.02, drain_s=WITHIN_S
        )

    def move(self, target: Path) -> None:
        run_folder.link(self.link, target)

    def is_at(self, target: Path) -> bool:
        return self.rollout.current.identity.startswith(f"{target} ")


@pytest.fixture
def served(tmp_path: Path, versions: list[Path]) -> Iterator[Served]:
    served = Served(tmp_path, versions[0])
    yield served
    asyncio.run(served.rollout.close())


def story_of(version: Path, prompt: str) -> str:
    model, tokenizer = checkpoint.load_model(version)
    (completion,) = Engine(TorchBackend(model), tokenizer).generate([prompt], [STORY])
    return completion.text


def test_no_request_fails_while_the_reference_moves_under_load(served: Served, versions: list[Path]) -> None:
    """Every request is answered, by the version that its answer names."""
    answers: list[tuple[str, Future[Completion]]] = []
    failures: list[Exception] = []
    is_finished = threading.Event()

    def submit_until_over() -> None:
        while not is_finished.is_set():
            try:
                model, future = served.rollout.submit("The cat", STORY)
                future.result(WITHIN_S)
                answers.append((model.identity.split()[0], future))
            except EngineBusyError:
                failures.append(AssertionError("six requests at once are not too many"))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=submit_until_over) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for number in (1, 2, 3, 0, 2):
            before = len(answers)
            served.move(versions[number])
            wait_for(lambda: served.is_at(versions[number]))  # noqa: B023
            wait_for(lambda: len(answers) > before + 20)  # noqa: B023
    finally:
        is_finished.set()
        for thread in threads:
            thread.join()
    assert failures == []
    expected = {str(path): story_of(path, "The cat") for path in versions}
    assert len(set(expected.values())) == 4
    assert {name for name, _ in answers} == set(expected)
    assert all(future.result().text == expected[name] for name, future in answers)


def test_the_old_version_finishes_its_requests_and_then_its_memory_is_free(
    served: Served, versions: list[Path]
) -> None:
    model, running = served.rollout.submit("The cat", LONG)
    weights = weakref.ref(model._thread._engine.backend)  # type: ignore[union-attr]
    assert model is served.rollout.current
    served.move(versions[1])
    wait_for(lambda: served.is_at(versions[1]))
    assert len(running.result(WITHIN_S).tokens) > 0
    with pytest.raises(EngineClosedError):
        model.submit("The cat", STORY)

    def is_free() -> bool:
        gc.collect()
        return weights() is None

    wait_for(is_free)
    assert "took over from tiny step-12" in served.rollout.status.detail


@pytest.mark.parametrize(
    "fault, expected",
    [
        ("flipped", "is not what was written (its sha256 differs)"),
        ("nan", "numbers that are not finite"),
        ("mute", "writes nothing"),
        ("pickle", "is a pickle"),
        ("shape", "d_ff is 255 under slm_ray, and 256 by Llama's own fields"),
    ],
)
def test_a_version_that_fails_leaves_the_old_one_serving_and_is_not_tried_again(
    served: Served, versions: list[Path], tmp_path: Path, fault: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = make_bad(versions[1], tmp_path / "bad", fault)
    served.move(bad)
    wait_for(lambda: served.rollout.status.state == "failed")
    status = served.rollout.description.rollout
    assert expected in status.detail and "tiny step-12 goes on" in status.detail
    assert expected in caplog.text
    looks = count_looks(served.rollout)
    wait_for(lambda: looks() > 5)
    assert caplog.text.count(expected) == 1
    _, future = served.rollout.submit("The cat", STORY)
    assert future.result(WITHIN_S).text == story_of(versions[0], "The cat") and served.is_at(versions[0])
    served.move(versions[2])
    wait_for(lambda: served.is_at(versions[2]))
    assert served.rollout.status.state == "serving"


def count_looks(rollout: Rollout) -> Callable[[], int]:
    """How often the watch has looked since."""
    looks = 0
    look = rollout._check_alias

    def counted(watch: AliasWatch) -> bool:
        nonlocal looks
        looks += 1
        return look(watch)

    rollout._check_alias = counted  # type: ignore[method-assign]
    return lambda: looks


def make_bad(source: Path, target: Path, fault: str) -> Path:
    if fault == "nan":
        return broken_copy(source, target, float("nan"))
    if fault == "mute":  # all logits are alike, and the end-of-text token has the lowest id
        return broken_copy(source, target, 0.0)
    shutil.copytree(source, target)
    weights = target / "model" / "model.safetensors"
    if fault == "flipped":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    if fault == "pickle":
        torch.save({}, target / "model" / "pytorch_model.bin")
    if fault == "shape":
        config = target / "model" / "config.json"
        text = config.read_text()
        assert '"d_ff": 256' in text
        config.write_text(text.replace('"d_ff": 256', '"d_ff": 255'))
        (target / verification.MARKER).unlink()
        checkpoint.commit_partial(target.rename(target.with_name("bad.raw")), target)
    return target


def test_moving_back_from_a_failed_version_clears_the_status(
    served: Served, versions: list[Path], tmp_path: Path
) -> None:
    served.move(make_bad(versions[1], tmp_path / "bad", "flipped"))
    wait_for(lambda: served.rollout.status.state == "failed")
    served.move(versions[0])
    wait_for(lambda: served.rollout.status.state == "serving")
    assert "back to tiny" in served.rollout.status.detail


def test_a_reference_that_is_gone_for_a_while_is_said_and_followed_again(served: Served, versions: list[Path]) -> None:
    served.link.unlink()
    wait_for(lambda: "goes on" in served.rollout.status.detail)
    assert served.rollout.status.state == "serving"
    assert served.rollout.submit("The cat", STORY)[1].result(WITHIN_S).text
    served.move(versions[1])
    wait_for(lambda: served.is_at(versions[1]))
    assert "goes on" not in served.rollout.status.detail


def test_a_moved_alias_is_followed_and_a_store_that_is_gone_costs_nothing(
    versions: list[Path], mlflow_uri: str, tmp_path: Path
) -> None:
    run_id = mlflow_runs.start_run(mlflow_uri, "tests", "rollout", {}).run_id
    uri = f"sqlite:///{tmp_path / 'moved.db'}"
    assert register_champion(mlflow_uri, "rolled", versions[0], run_id) == "1"
    shutil.copy(mlflow_uri.removeprefix("sqlite:///"), tmp_path / "moved.db")
    rollout = start_rollout("models:/rolled@champion", uri, 1, max_slots=2, watch_interval_s=0.05)
    try:
        assert rollout.current.version.version == "1"
        assert rollout.description.evaluation == {}
        (tmp_path / "moved.db").rename(tmp_path / "away.db")
        wait_for(lambda: "the registry does not answer" in rollout.status.detail)
        assert rollout.submit("The cat", STORY)[1].result(WITHIN_S).text
        (tmp_path / "away.db").rename(tmp_path / "moved.db")
        assert register_champion(uri, "rolled", versions[1], run_id) == "2"
        wait_for(lambda: rollout.current.version.version == "2")
    finally:
        asyncio.run(rollout.close())


def test_a_server_without_an_answer_at_start_is_one_line(mlflow_uri: str) -> None:
    with pytest.raises(UserError, match="is not available") as caught:
        start_rollout("models:/never-registered@champion", mlflow_uri, 1)
    assert "\n" not in str(caught.value)


def test_closing_lets_running_stories_finish_and_refuses_new_ones(served: Served) -> None:
    _, running = served.rollout.submit("The cat", LONG)
    closing = threading.Thread(target=lambda: asyncio.run(served.rollout.close(drain_s=WITHIN_S)))
    closing.start()
    wait_for(lambda: not served.rollout.is_ready)
    with pytest.raises(EngineClosedError, match="stopping"):
        served.rollout.submit("The cat", STORY)
    assert running.result(WITHIN_S).tokens
    closing.join(WITHIN_S)
    assert not closing.is_alive()


def test_closing_does_not_wait_beyond_its_bound(served: Served) -> None:
    """Two stories of 2,000 tokens on a model that never ends them would take longer."""
    futures = [served.rollout.submit("The cat", LONG)[1] for _ in range(40)]
    asyncio.run(served.rollout.close(drain_s=0.01))
    assert all(future.done() for future in futures)
    assert any(isinstance(future.exception(), EngineClosedError) for future in futures)


def test_a_file_with_weights_as_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="is a pickle"):
        registry.resolve_model(str(tmp_path / "model.pt"))


def test_a_loaded_model_without_a_watch_serves_as_it_is(versions: list[Path]) -> None:
    rollout = Rollout(LoadedModel(registry.resolve_model(str(versions[0])), max_slots=2))
    assert rollout.is_ready and rollout.status.state == "serving"
    assert [answer.prompt for answer in rollout.current.answers] == [
        "",
        "The",
        "Once upon a time",
        "One day, a little dog",
    ]
    asyncio.run(rollout.close())
    assert not rollout.is_ready

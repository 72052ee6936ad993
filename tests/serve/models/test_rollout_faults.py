"""What a rollout says to strangers, and does when the reference moves back or the backend is broken."""

import asyncio
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.api.metrics import Metrics
from serve.api.streaming import submit_stories
from serve.models.description import for_strangers
from serve.models.loaded_model import LoadedModel
from serve.models.rollout import AliasWatch, Rollout, start_rollout
from slm_ray.corpus.instructions import INSTRUCTION_TEMPLATE, STORY_TEMPLATE
from slm_ray.generation import cache_size
from slm_ray.generation.engine_thread import EngineError, Order
from slm_ray.generation.sampling import SamplingParams
from slm_ray.runs import run_folder
from slm_ray.tracking import registry
from slm_ray.tracking.registry import RegistryError, resolve_model
from tests.serve.models.test_rollout import WITHIN_S, wait_for
from tests.support.tiny_model import write_endless_model, write_tiny_model

SECRET = "http://mouse:cheese@mlflow.example:5000/?token=cheese"
STORY = SamplingParams(max_tokens=3, seed=1)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("versions")
    return [write_endless_model(folder / f"v{seed}", seed=seed) for seed in range(2)]


def load(version: Path) -> LoadedModel:
    return LoadedModel(resolve_model(str(version)), max_slots=2)


class PanicError(BaseException):
    """As a panic of a Rust package."""


@pytest.mark.parametrize("kind", [RegistryError, OSError, PanicError])
def test_nobody_reads_the_address_of_a_store_that_is_away(
    versions: list[Path], kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> str:
        raise kind(f"models:/tiny@champion is not available from {SECRET}: no route to host")

    rollout = Rollout(load(versions[0]), AliasWatch(locate=away, load=lambda: load(versions[0]), interval_s=0.02))
    try:
        wait_for(lambda: bool(rollout.status.detail))
        assert rollout.description.rollout.detail == "the registry does not answer: tiny step-12 goes on"
        assert "no route to host" in caplog.text
        assert "mouse" not in caplog.text and "cheese" not in caplog.text
    finally:
        asyncio.run(rollout.close())


@pytest.mark.parametrize("kind", [OSError, PanicError])
def test_nobody_reads_what_a_library_says_of_a_version_that_fails(
    versions: list[Path], kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> LoadedModel:
        raise kind(f"cannot fetch {SECRET} to /tmp/slm-model-1/checkpoint")

    rollout = Rollout(load(versions[0]), AliasWatch(locate=lambda: "models:/tiny/2", load=fail, interval_s=0.02))
    try:
        wait_for(lambda: rollout.status.state == "failed")
        assert rollout.status.detail == "models:/tiny/2 is not served: it cannot be loaded; tiny step-12 goes on"
        assert "cannot fetch" in caplog.text
        assert "mouse" not in caplog.text and "token" not in caplog.text
    finally:
        asyncio.run(rollout.close())


def test_a_version_that_memory_does_not_hold_leaves_the_old_one_serving(
    versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = AliasWatch(locate=lambda: "models:/tiny/2", load=lambda: load(versions[1]), interval_s=0.02)
    first = load(versions[0])
    monkeypatch.setattr(cache_size, "available_bytes", lambda: 2**20)
    rollout = Rollout(first, watch)
    try:
        wait_for(lambda: rollout.status.state == "failed")
        assert "its weights are 3 MB" in rollout.status.detail and "1 MB are free" in rollout.status.detail
        assert rollout.submit("Once", STORY)[1].result(WITHIN_S).tokens
    finally:
        asyncio.run(rollout.close())


def test_a_copy_of_a_model_is_gone_once_it_is_read(
    versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that serves is killed at the end of a Ray of our own: whatever it keeps would stay."""
    copy = tmp_path / "slm-model-x"
    shutil.copytree(versions[0], copy / "checkpoint")
    resolved = dataclasses.replace(resolve_model(str(copy / "checkpoint")), scratch=copy)
    monkeypatch.setattr(registry, "resolve_model", lambda *_: resolved)
    rollout = start_rollout("models:/copied@champion", "", 1, max_slots=2, watch_interval_s=60)
    try:
        assert not copy.exists()
        assert rollout.submit("Once", STORY)[1].result(WITHIN_S).tokens
    finally:
        asyncio.run(rollout.close())


def test_strangers_read_no_addresses_and_no_folders() -> None:
    text = f"/home/mouse/runs/x/model/config.json at {SECRET}: d_ff is 3/4"
    assert for_strangers(text) == "config.json at (an address) d_ff is 3/4"


@pytest.fixture
def link(tmp_path: Path, versions: list[Path]) -> Iterator[tuple[Path, Rollout]]:
    run_folder.link(tmp_path / "best", versions[0])
    rollout = start_rollout(str(tmp_path / "best"), "", 1, max_slots=2, watch_interval_s=0.02, drain_s=WITHIN_S)
    yield tmp_path / "best", rollout
    asyncio.run(rollout.close())


def test_moving_back_is_looked_at_while_the_old_version_finishes(
    link: tuple[Path, Rollout], versions: list[Path]
) -> None:
    best, rollout = link
    _, running = rollout.submit("The cat", SamplingParams(max_tokens=10**6, seed=1))
    for version in (versions[1], versions[0]):
        run_folder.link(best, version)
        wait_for(lambda: rollout.current.identity.startswith(f"{version} "))  # noqa: B023
    assert not running.done()


def test_all_stories_of_a_request_come_from_one_version(versions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load(versions[0]), load(versions[1])
    rollout = Rollout(first)
    engine = first._thread._engine  # type: ignore[union-attr]
    check = engine.request

    def switch_meanwhile(*args: Any, **options: Any) -> Any:
        rollout.current = second
        return check(*args, **options)

    monkeypatch.setattr(engine, "request", switch_meanwhile)
    monkeypatch.setattr(second, "submit_all", lambda _: pytest.fail("the other version is asked"))

    async def ask() -> list[tuple[LoadedModel, str]]:
        stories = submit_stories(rollout, [("Once", SamplingParams(max_tokens=9, temperature=0))] * 3, Metrics())
        return [(one.model, (await one.completion()).text) for one in stories]

    try:
        answers = asyncio.run(ask())
        assert {model.title for model, _ in answers} == {first.title}
        assert [model for model, _ in answers] == [first] * 3 and len({text for _, text in answers}) == 1
    finally:
        first.close()
        asyncio.run(rollout.close())


def test_a_backend_that_fails_at_every_step_is_not_healthy(
    versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = Rollout(load(versions[0]))
    try:
        asyncio.run(rollout.check())
        backend = rollout.current._thread._engine.backend  # type: ignore[union-attr]
        with monkeypatch.context() as patch:
            patch.setattr(backend, "decode", lambda _: 1 / 0)
            for _ in range(3):
                assert rollout.is_ready
                with pytest.raises(EngineError):
                    rollout.submit("Once", STORY)[1].result(WITHIN_S)
            with pytest.raises(EngineError):
                asyncio.run(rollout.check())
            assert not rollout.is_ready
        asyncio.run(rollout.check())
        assert rollout.is_ready
    finally:
        asyncio.run(rollout.close())


def test_a_prompt_is_made_for_the_version_that_takes_it(tmp_path: Path) -> None:
    """A version of stories is closed while a conversation comes in; the next one learned with instructions."""
    folders = {
        template: write_tiny_model(tmp_path / str(number), template=template)
        for number, template in enumerate((STORY_TEMPLATE, INSTRUCTION_TEMPLATE))
    }
    old, new = (LoadedModel(resolve_model(str(folder)), max_slots=1) for folder in folders.values())
    rollout, prompts = Rollout(old), list[str]()

    def orders_for(model: LoadedModel) -> list[Order]:
        prompts.append(model.prompt_of("Words: cat"))
        old.close()
        rollout.current = new
        return [Order(prompts[-1], SamplingParams(max_tokens=2))]

    model, (future,) = rollout.submit_all(orders_for)
    assert model is new and future.result(60).prompt_tokens == len(new.tokenizer.encode("Words: cat\nStory:\n"))
    assert prompts == ["Words: cat", "Words: cat\nStory:\n"]
    asyncio.run(rollout.close())

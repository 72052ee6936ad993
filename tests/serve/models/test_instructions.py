"""A model that learned instructions: words at `/generate`, instructions in conversations; another refuses words."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from serve.api.routes import create_api
from serve.models.loaded_model import LoadedModel
from serve.models.rollout import Rollout
from slm_ray.corpus.instructions import CHAT_TEMPLATE, INSTRUCTION_TEMPLATE
from slm_ray.runs import checkpoint
from slm_ray.tracking.registry import resolve_model
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module", params=[True, False], ids=["instructed", "stories"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, bool]]:
    folder = write_tiny_model(tmp_path_factory.mktemp("serve") / "tiny")
    if request.param:
        partial = folder.rename(folder.with_name("tiny.partial"))
        (partial / checkpoint.MODEL / CHAT_TEMPLATE).write_text(INSTRUCTION_TEMPLATE, encoding="utf-8")
        (partial / checkpoint.MARKER).unlink()
        checkpoint.commit_partial(partial, folder)
    rollout = Rollout(LoadedModel(resolve_model(str(Path(folder))), max_slots=2, max_waiting=2))
    yield create_api(rollout), request.param
    asyncio.run(rollout.close())


def ask(api: FastAPI, method: str, path: str, **body: object) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            content = json.dumps(body) if body else None
            return await client.request(method, path, content=content, headers={"Content-Type": "application/json"})

    return asyncio.run(run())


def test_words_become_the_instruction_that_the_model_learned(served: tuple[FastAPI, bool]) -> None:
    api, is_instructed = served
    assert ask(api, "GET", "/model").json()["has_instructions"] == is_instructed
    told = {"max_tokens": 12, "seed": 3}
    answer = ask(api, "POST", "/generate", prompt=" The cat", words=["red  ball\n", "kite", " "], **told)
    if not is_instructed:
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("words: the model that is served was trained without instructions")
        return
    plain = ask(api, "POST", "/generate", prompt="Words: red ball, kite\nStory:\nThe cat", **told).json()
    assert answer.json()["story"].removeprefix(" The cat") == plain["story"].partition("The cat")[2]
    assert answer.json()["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    free = ask(api, "POST", "/generate", prompt="", words=[], **told).json()
    assert f"Story:\n{free['story']}" == ask(api, "POST", "/generate", prompt="Story:\n", **told).json()["story"]


def test_a_conversation_gives_an_instruction_or_a_beginning(served: tuple[FastAPI, bool]) -> None:
    api, is_instructed = served
    said = [{"role": "user", "content": " Words: kite "}]
    answer = ask(api, "POST", "/v1/chat/completions", model="tiny", messages=said, max_tokens=12)
    prompt = "Words: kite\nStory:\n" if is_instructed else " Words: kite "
    plain = ask(api, "POST", "/generate", prompt=prompt, max_tokens=12)
    assert answer.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("words", [[""], ["a" * 65], ["a"] * 17, "kite", [7]])
def test_other_words_are_one_sentence(served: tuple[FastAPI, bool], words: object) -> None:
    answer = ask(served[0], "POST", "/generate", prompt="", words=words)
    assert answer.status_code == 422 and answer.json()["detail"].startswith("words")

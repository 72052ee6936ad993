"""Our own routes, asked without Ray and without a socket."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.api.middleware import MAX_BODY_BYTES
from serve.api.routes import create_api
from serve.models.loaded_model import LoadedModel
from serve.models.rollout import Rollout
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs.checkpoint import load_model
from slm_ray.tracking.registry import resolve_model
from tests.support.tiny_model import write_tiny_model

VERSION = {"name": "tiny", "version": "step-12", "run_id": "run-1", "data_fingerprint": "f" * 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def api(model: Path) -> Iterator[FastAPI]:
    rollout = Rollout(LoadedModel(resolve_model(str(model)), max_slots=2, max_waiting=2))
    yield create_api(rollout)
    asyncio.run(rollout.close())


def ask(api: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    (answer,) = ask_at_once(api, 1, method, path, **options)
    return answer


def ask_at_once(api: FastAPI, count: int, method: str, path: str, **options: Any) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return await asyncio.gather(*(client.request(method, path, **options) for _ in range(count)))

    return asyncio.run(run())


def write(api: FastAPI, **body: Any) -> httpx.Response:
    return ask(api, "POST", "/generate", content=json.dumps(body), headers={"Content-Type": "application/json"})


def test_story_is_the_engines_with_lineage_and_usage(api: FastAPI, model: Path) -> None:
    answer = write(api, prompt="The cat", max_tokens=20, seed=5, temperature=1, top_p=0.9)
    params = SamplingParams(max_tokens=20, seed=5, temperature=1, top_p=0.9)
    weights, tokenizer = load_model(model)
    (expected,) = Engine(TorchBackend(weights), tokenizer).generate(["The cat"], [params])
    content = answer.json()
    assert answer.status_code == 200
    assert content["story"] == "The cat" + expected.text
    assert content["finish_reason"] == expected.finish_reason
    assert content["model"] == VERSION
    assert content["usage"]["prompt_tokens"] == expected.prompt_tokens
    assert content["usage"]["completion_tokens"] == len(expected.tokens)
    assert content["usage"]["seconds"] > 0 and content["usage"]["tokens_per_second"] > 0


@pytest.mark.parametrize("prompt", ["", "\x00", "🦊 naïve", "<|endoftext|>", "  two  spaces\n"])
def test_any_text_may_begin_a_story(api: FastAPI, prompt: str) -> None:
    answer = write(api, prompt=prompt, max_tokens=3)
    assert answer.status_code == 200
    assert answer.json()["story"].startswith(prompt)


def test_defaults_are_the_documented_ones(api: FastAPI) -> None:
    schema = ask(api, "GET", "/openapi.json").json()["components"]["schemas"]["GenerateRequest"]
    defaults = {name: field.get("default") for name, field in schema["properties"].items()}
    assert defaults == {
        "prompt": None, "words": None, "max_tokens": 50, "temperature": 0.7, "top_k": 50, "top_p": 1.0, "min_p": 0.0,
        "seed": None, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {},
        "stop": [], "logprobs": None, "stream": False,
    }  # fmt: skip
    assert schema["required"] == ["prompt"]


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("prompt", None, "prompt: input should be a valid string"),
        ("prompt", 5, "prompt: input should be a valid string"),
        ("prompt", ["a"], "prompt: input should be a valid string"),
        ("prompt", "a\ud800", "prompt: the prompt is no Unicode text"),
        ("prompt", "x" * 64, "prompt: the prompt has 64 tokens and the context of this model holds 63"),
        ("max_tokens", 0, "max_tokens: input should be greater than or equal to 1"),
        ("max_tokens", -5, "max_tokens: input should be greater than or equal to 1"),
        ("max_tokens", 2049, "max_tokens: input should be less than or equal to 2048"),
        ("max_tokens", 10**400, "max_tokens: input should be less than or equal to 2048"),
        ("max_tokens", True, "max_tokens: input should be a valid integer"),
        ("max_tokens", "50", "max_tokens: input should be a valid integer"),
        ("max_tokens", 5.0, "max_tokens: input should be a valid integer"),
        ("max_tokens", None, "max_tokens: input should be a valid integer"),
        ("temperature", -0.1, "temperature: input should be greater than or equal to 0"),
        ("temperature", 101, "temperature: input should be less than or equal to 100"),
        ("temperature", float("nan"), "temperature: input should be a finite number"),
        ("temperature", float("inf"), "temperature: input should be a finite number"),
        ("temperature", 10**400, "temperature: input should be"),
        ("temperature", True, "temperature: input should be a valid number"),
        ("temperature", "hot", "temperature: input should be a valid number"),
        ("top_k", -1, "top_k: input should be greater than or equal to 0"),
        ("top_k", False, "top_k: input should be a valid integer"),
        ("top_p", 0, "top_p: input should be greater than 0"),
        ("top_p", 1.5, "top_p: input should be less than or equal to 1"),
        ("top_p", float("nan"), "top_p: input should be a finite number"),
        ("min_p", 1.01, "min_p: input should be less than or equal to 1"),
        ("presence_penalty", -2.1, "presence_penalty: input should be greater than or equal to -2"),
        ("frequency_penalty", float("nan"), "frequency_penalty: input should be a finite number"),
        ("logit_bias", {"05": 1}, "logit_bias: its keys must be token ids"),
        ("logit_bias", {"5": "a"}, "logit_bias: input should be a valid number"),
        ("logit_bias", {"300": 1}, "logit_bias: token 300 is not one of the 300 of this model"),
        ("logit_bias", None, "logit_bias: input should be a valid dictionary"),
        ("seed", -1, "seed: input should be greater than or equal to 0"),
        ("seed", 2**63, "seed: input should be less than or equal to 9223372036854775807"),
        ("seed", "a", "seed: input should be a valid integer"),
        ("max_token", 5, "unknown field 'max_token': expected prompt, words, max_tokens"),
        ("\ud800", 5, "the body must be a JSON object with the fields prompt, words, max_tokens"),
    ],
)
def test_a_wrong_field_is_refused_in_one_sentence(api: FastAPI, field: str, value: Any, expected: str) -> None:
    answer = write(api, **{"prompt": "Once", field: value})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(expected)


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 422),
        (b"{", 422),
        (b"[]", 422),
        (b"null", 422),
        (b'"Once"', 422),
        (b"{}", 422),
        (b'{"prompt": "a\xff"}', 400),
        (b"[" * 30_000, 400),
        (b'{"prompt": "a", "top_k": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', 413),
    ],
)
def test_a_body_that_is_no_request_is_refused_in_words(api: FastAPI, body: bytes, status: int) -> None:
    answer = ask(api, "POST", "/generate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert isinstance(answer.json()["detail"], str)


def test_missing_prompt_and_wrong_content_type_are_named(api: FastAPI) -> None:
    assert write(api, seed=1).json() == {"detail": "prompt is required"}
    answer = ask(api, "POST", "/generate", data={"prompt": "Once"})
    assert answer.status_code == 422 and "application/json" in answer.json()["detail"]


def test_huge_top_k_means_every_token(api: FastAPI) -> None:
    assert write(api, prompt="Once", top_k=10**30, max_tokens=2).status_code == 200


def test_too_many_at_once_get_429_and_the_others_whole_stories(api: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots and a line of two: the engine stands still until the others were refused."""
    body = {"prompt": "Once", "max_tokens": 40, "seed": 1}
    all_refused, step = threading.Event(), Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (all_refused.wait(60), step(engine))[1])

    async def run() -> list[httpx.Response]:
        transport, answers = httpx.ASGITransport(api, raise_app_exceptions=False), list[httpx.Response]()
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            for answer in asyncio.as_completed([client.post("/generate", json=body) for _ in range(20)]):
                answers.append(await answer)
                if len(answers) == 20 - 4:
                    all_refused.set()
        return answers

    answers = asyncio.run(run())
    stories = {answer.json()["story"] for answer in answers if answer.status_code == 200}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(stories) == 1 and len(refused) == 20 - 4
    assert all(answer.headers["Retry-After"] == "2" for answer in refused)


def test_a_client_that_leaves_frees_its_slot(api: FastAPI) -> None:
    async def leave() -> None:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": "Once", "max_tokens": 2048, "seed": 0}
            tasks = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(4)]
            await asyncio.wait(tasks, timeout=0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while write(api, prompt="Once", max_tokens=1).status_code == 429:
        assert time.monotonic() < deadline


def test_health_model_page_and_unknown_routes(api: FastAPI) -> None:
    assert ask(api, "GET", "/health").json() == {"status": "ok"}
    described = ask(api, "GET", "/model").json()
    assert described.items() >= VERSION.items()
    assert (described["step"], described["seq_len"]) == (12, 64)
    page = ask(api, "GET", "/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text)  # no outside resource
    assert ask(api, "GET", "/nothing").status_code == 404
    assert ask(api, "GET", "/generate").status_code == 405
    as_by_rays_proxy = ask(api, "GET", "/-/healthz")  # which is not before it
    assert (as_by_rays_proxy.status_code, as_by_rays_proxy.text) == (200, "success")

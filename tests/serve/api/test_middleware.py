"""What stands before the routes: keys, rates, origins, headers."""

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.api.middleware import BodyLimitMiddleware
from serve.api.settings import ApiSettings, key_digests
from serve.deployment import _http_options
from serve.options import AppConfig, ServeConfig
from slm_ray.errors import UserError
from tests.support.http_server import running
from tests.support.tiny_model import write_endless_model

KEY = "a-secret-of-many-letters"
BODY = {"prompt": "Once", "max_tokens": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless_model(tmp_path_factory.mktemp("protection") / "tiny")


def test_keys_come_from_the_variable_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\nanother-secret\n", encoding="utf-8")
    assert key_digests({"SLM_API_KEYS": str(file)}) == key_digests({"SLM_API_KEYS": f" {KEY}, another-secret"})
    assert key_digests({}) == ()


@pytest.mark.parametrize(
    "value, message",
    [
        ("", "holds no key"),
        (" , ", "holds no key"),
        ("short", "at least 8"),
        ("/run/secrets/forgotten", "there is no file /run/secrets/forgotten"),
        ("./forgotten.txt", "there is no file"),
    ],
)
def test_a_variable_without_keys_is_refused_and_does_not_open_the_door(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        key_digests({"SLM_API_KEYS": value})


def test_with_keys_every_route_but_health_and_the_page_asks_for_one(model: Path) -> None:
    with running(model, ApiSettings(key_digests=key_digests({"SLM_API_KEYS": KEY}))) as url:
        for path in ("/model", "/metrics", "/openapi.json", "/v1/models", "/nothing"):
            refused = httpx.get(f"{url}{path}")
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
        for authorization in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"):
            headers = {"Authorization": authorization}
            assert httpx.post(f"{url}/generate", json=BODY, headers=headers).status_code == 401
        assert {httpx.get(f"{url}{path}").status_code for path in ("/health", "/-/healthz", "/")} == {200}
        headers = {"Authorization": f"bearer {KEY}"}
        assert httpx.post(f"{url}/generate", json=BODY, headers=headers).status_code == 200


def test_a_body_that_stays_out_is_not_waited_for_and_health_needs_none(model: Path) -> None:
    async def answer(scope: dict[str, object], limit: BodyLimitMiddleware) -> int:
        sent: list[Message] = []

        async def silent() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        await limit({"type": "http", "path": "/health", **scope}, silent, send)
        return int(sent[0]["status"])

    async def says_204(_: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    limit = BodyLimitMiddleware(says_204, 100, limit_s=0.05)
    assert asyncio.run(answer({"method": "POST"}, limit)) == 408
    assert asyncio.run(answer({"method": "GET"}, limit)) == 204
    with running(model, ApiSettings(key_digests=key_digests({"SLM_API_KEYS": KEY}))) as url:
        assert httpx.post(f"{url}/health").status_code == 401


def test_the_proxy_waits_longer_than_the_application() -> None:
    config = ServeConfig(request_timeout_s=3)
    assert _http_options(config)["request_timeout_s"] > config.api_settings().request_timeout_s
    assert ServeConfig(host="::1").url == "http://[::1]:8000"


def test_a_caller_that_is_too_fast_is_told_when_to_come_again(model: Path) -> None:
    settings = ApiSettings(key_digests=key_digests({"SLM_API_KEYS": f"{KEY},another-secret"}), requests_per_minute=2)
    with running(model, settings) as url:

        def ask(key: str) -> httpx.Response:
            return httpx.get(f"{url}/model", headers={"Authorization": f"Bearer {key}"})

        answers = [ask(KEY) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
        assert ask("another-secret").status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_made_up_keys_do_not_raise_the_rate_where_none_are_checked(model: Path) -> None:
    with running(model, ApiSettings(requests_per_minute=2)) as url:
        headers = [{"Authorization": f"Bearer made-up-{number}"} for number in range(3)]
        assert [httpx.get(f"{url}/model", headers=own).status_code for own in headers] == [200, 200, 429]


def test_no_request_may_ask_for_more_stories_than_can_be_taken() -> None:
    assert AppConfig(rows=2, max_waiting=1).api_settings().max_choices == 3
    assert AppConfig(max_choices=2).api_settings().max_choices == 2


def test_other_origins_are_let_in_only_where_they_are_named(model: Path) -> None:
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with running(model) as url:
        assert "access-control-allow-origin" not in httpx.options(f"{url}/generate", headers=preflight).headers
        simple = {"Content-Type": "text/plain", "Origin": "https://example.org"}  # needs no preflight
        answer = httpx.post(f"{url}/generate", content=b'{"prompt": "Once"}', headers=simple)
        assert answer.status_code == 422 and "application/json" in answer.json()["detail"]
        nothing = httpx.post(f"{url}/generate", content=b'{"prompt": "Once"}', headers={"Content-Type": ""})
        assert nothing.status_code == 422
    with running(model, ApiSettings(cors_origins=("https://example.org",))) as url:
        allowed = httpx.options(f"{url}/generate", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.options(f"{url}/generate", headers=preflight | {"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers


def test_a_story_that_takes_too_long_is_given_up(model: Path) -> None:
    long = {"prompt": "Once", "max_tokens": 2048, "seed": 3}
    with running(model, ApiSettings(request_timeout_s=0.05)) as url:
        late = httpx.post(f"{url}/generate", json=long)
        assert late.status_code == 504 and "longer" in late.json()["detail"]
        streamed = httpx.post(f"{url}/generate", json=long | {"stream": True})
        assert "took longer than 0.05 s" in streamed.text.splitlines()[-2]


def test_answers_are_taken_for_what_they_are_and_the_page_loads_nothing_else(model: Path) -> None:
    with running(model) as url:
        page = httpx.get(url)
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")

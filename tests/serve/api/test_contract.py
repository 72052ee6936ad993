"""OpenAI's contract as real clients read it, and what any HTTP client may expect."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serve.api.openai_schemas import CompletionRequest
from serve.api.schemas import GenerateRequest
from serve.api.settings import ApiSettings, key_digests
from serve.api.token_offsets import TokenOffsets
from slm_ray.generation.detokenizer import TextStream
from slm_ray.generation.logprobs import TokenLogprob
from slm_ray.runs.checkpoint import load_model
from slm_ray.tokenization.tokenizer import END_OF_TEXT
from tests.support.http_server import running
from tests.support.tiny_model import write_endless_model, write_tiny_model

KEY = "a-secret-of-many-letters"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("contract") / "tiny")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with running(model, ApiSettings(cors_origins=("https://example.org",)), waiting=60) as url:
        yield url


def complete(url: str, **options: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "The cat", "max_tokens": 8, "seed": 5, **options}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_the_sampled_token_is_among_the_top_ones(url: str) -> None:
    for count in (0, 1, 5):
        logprobs = complete(url, temperature=2, logprobs=count, max_tokens=12)["choices"][0]["logprobs"]
        for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]):
            assert token in top and len(top) <= count + 1
            assert top[token] >= value  # of two tokens with one text the likelier is shown


def endings(url: str, **options: Any) -> Iterator[dict[str, Any]]:
    """Choices of stories that end by themselves."""
    for seed in range(200):
        (choice,) = complete(url, seed=seed, temperature=2, **options)["choices"]
        if choice["finish_reason"] == "stop":
            yield choice


def test_the_end_of_text_token_has_its_entry(url: str) -> None:
    """lm-evaluation-harness takes the last entry for that of the one token which was written, and drops it."""
    options = {"echo": True, "logprobs": 1, "max_tokens": 1}
    ended, usual = next(endings(url, **options)), complete(url, **options)
    n_prompt = usual["usage"]["prompt_tokens"]
    logprobs = ended["logprobs"]
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [
        n_prompt + 1
    ] * 4
    assert logprobs["token_logprobs"][:-1] == usual["choices"][0]["logprobs"]["token_logprobs"][:n_prompt]
    assert (logprobs["tokens"][-1], logprobs["text_offset"][-1]) == ("<|endoftext|>", len(ended["text"]))


def test_the_end_of_text_token_has_its_entry_in_a_stream_too(url: str) -> None:
    for seed in range(200):
        whole = complete(url, seed=seed, temperature=2, logprobs=1)
        if whole["choices"][0]["finish_reason"] == "stop":
            break
    body = {"model": "tiny", "prompt": "The cat", "max_tokens": 8, "seed": seed, "temperature": 2, "logprobs": 1}
    lines = httpx.post(f"{url}/v1/completions", json=body | {"stream": True}).text.splitlines()
    parts = [json.loads(line[6:])["choices"][0]["logprobs"] for line in lines if line and "[DONE]" not in line]
    tokens = [token for part in parts if part for token in part["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert tokens[-1] == END_OF_TEXT


def test_the_prompt_is_measured_once_for_all_its_stories(url: str) -> None:
    choices = complete(url, n=3, echo=True, logprobs=1, temperature=0)["choices"]
    assert len({str(choice["logprobs"]) for choice in choices}) == 1
    only = complete(url, n=3, echo=True, logprobs=1, max_tokens=0)
    assert [choice["index"] for choice in only["choices"]] == [0, 1, 2]
    assert len({str(choice["logprobs"]) for choice in only["choices"]}) == 1
    assert only["usage"]["prompt_tokens"] == len(only["choices"][0]["logprobs"]["tokens"])
    body = CompletionRequest(model="tiny", prompt="a", n=3, echo=True, logprobs=1, max_tokens=4)
    assert [body.sampling(number).prompt_logprobs for number in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0}, {"top_k": None}, {"top_k": -1}, {"stop": ""}, {"repetition_penalty": None},
        {"max_tokens": None, "max_completion_tokens": 8}, {"max_completion_tokens": 8}, {"prompt": ["The cat"] * 20},
    ],
)  # fmt: skip
def test_what_clients_send_is_taken(url: str, options: dict[str, Any]) -> None:
    assert complete(url, **options)["choices"]


def test_either_name_of_the_most_tokens_is_kept() -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        assert CompletionRequest.model_validate({"model": "tiny", name: 3}).sampling(0).max_tokens == 3


def test_a_top_p_of_0_takes_the_likeliest(url: str) -> None:
    assert complete(url, top_p=0)["choices"][0]["text"] == complete(url, temperature=0)["choices"][0]["text"]


@pytest.mark.parametrize(
    "options, param",
    [
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": ["a", "x" * 300]}, "stop"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [[-1]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ],
)
def test_a_mistake_is_said_without_the_validators_words(url: str, options: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"} | options)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert not any(word in error["message"] for word in ("constrained", "list[", ".str", ".int"))


def test_a_body_of_wrong_items_fails_at_the_first() -> None:
    """0.4 s of the event loop where each of 65,000 items is an error of its own."""
    with pytest.raises(ValidationError) as prompts:
        CompletionRequest.model_validate({"model": "tiny", "prompt": [{}] * 20_000})
    with pytest.raises(ValidationError) as stops:
        CompletionRequest.model_validate({"model": "tiny", "prompt": "a", "stop": [1] * 30_000})
    with pytest.raises(ValidationError) as own_stops:
        GenerateRequest.model_validate({"prompt": "a", "stop": [1] * 10})
    assert [found.value.error_count() for found in (prompts, stops, own_stops)] == [4, 2, 1]  # one of each kind of list


def test_offsets_go_on_behind_bytes_that_form_no_character(model: Path) -> None:
    tokenizer = load_model(model)[1]
    broken = tokenizer.encode("🦊")[1]  # a byte from the middle of a character
    ids = [*tokenizer.encode("a"), broken, *tokenizer.encode("b🦊c")]
    text = tokenizer.decode(ids)
    placed = TokenOffsets(tokenizer).of([TokenLogprob(token, "", 0.0, ()) for token in ids])
    assert text == "a\ufffdb🦊c"
    assert [at for _, at in placed] == [0, 1, 2, 3, 3, 3, 3, 4]


def test_offsets_do_not_stay_behind_bytes_that_form_no_character(model: Path) -> None:
    tokenizer = load_model(model)[1]
    ids = [tokenizer.encode("🦊")[1]] * 60
    measured = TokenOffsets(tokenizer)
    placed = measured.of([TokenLogprob(token, "", 0.0, ()) for token in ids[:50]])
    for one in (measured.copy(), measured.copy()):  # each goes on by itself
        rest = one.of([TokenLogprob(token, "", 0.0, ()) for token in ids[50:]])
        offsets = [at for _, at in [*placed, *rest]]
        assert offsets == sorted(offsets) and all(n - 17 <= at <= n for n, at in enumerate(offsets))


def test_a_prompt_is_placed_once_for_all_its_stories(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """22 s of the event loop where each of 32 stories placed its 1,000 tokens anew."""
    pushed: list[int] = []
    push = TextStream.push
    monkeypatch.setattr(TextStream, "push", lambda self, token: pushed.append(token) or push(self, token))
    answer = complete(url, prompt=[70] * 40, n=8, max_tokens=0, echo=True, logprobs=1)
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [40] * 8
    assert len(pushed) == 40


@pytest.mark.parametrize("options", [{}, {"logprobs": 1}, {"prompt": ["The cat", "Tom"]}])
def test_several_that_only_measure_end_in_a_stream_too(url: str, options: dict[str, Any]) -> None:
    """One request measures for all choices of a prompt: each of them has to see its end."""
    body = {"model": "tiny", "prompt": "The cat", "max_tokens": 0, "echo": True, "n": 3, **options}
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=20) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    whole = complete(url, **{name: value for name, value in body.items() if name != "model"})["choices"]
    for one in whole:
        own = [choice for choice in choices if choice["index"] == one["index"]]
        assert "".join(choice["text"] for choice in own) == one["text"]
        assert own[-1]["finish_reason"] == "length"


def test_head_is_answered_as_get_without_a_body(url: str) -> None:
    for path in ("/health", "/ready", "/", "/v1/models", "/v1/models/tiny", "/model", "/metrics"):
        got, head = httpx.get(f"{url}{path}"), httpx.head(f"{url}{path}")
        assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
    assert httpx.head(f"{url}/nothing").status_code == httpx.head(f"{url}/v1/models/a/b").status_code == 404


def test_a_browsers_client_may_send_its_own_headers_and_read_the_ids(url: str) -> None:
    asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    for path in ("/v1/completions", "/v1/chat/completions"):
        preflight = httpx.options(f"{url}{path}", headers=headers | {"Access-Control-Request-Headers": asked})
        assert preflight.status_code == 200
        allowed = preflight.headers["access-control-allow-headers"].replace(" ", "").split(",")
        assert set(allowed) >= set(asked.split(","))
    answer = httpx.get(f"{url}/model", headers={"Origin": "https://example.org"})
    assert {"Retry-After", "X-Request-Id"} <= set(answer.headers["access-control-expose-headers"].split(", "))
    assert len(answer.headers["x-request-id"]) == 32


def test_a_name_that_is_not_the_servers_is_refused(model: Path, url: str) -> None:
    def status(host: str, path: str = "/model", to: str = url) -> int:
        return httpx.get(f"{to}{path}", headers={"Host": host}).status_code

    assert [status(host) for host in ("evil.example", "evil.example:8000", "localhost.evil.example")] == [421] * 3
    assert status("evil.example", "/") == 421
    good = ("localhost", "LOCALHOST:80", "127.0.0.1:5", "[::1]:8000", "10.1.2.3")
    assert {status(host) for host in good} == {200}
    assert status("pod.cluster.local", "/health") == 200
    with running(model, ApiSettings(allowed_hosts=("stories.example.org",))) as other:
        assert status("Stories.example.org:443", to=other) == 200
        assert status("evil.example", to=other) == 421


def test_ready_asks_for_no_key(model: Path) -> None:
    with running(model, ApiSettings(key_digests=key_digests({"SLM_API_KEYS": KEY}))) as url:
        assert httpx.get(f"{url}/ready").status_code == 200


def test_unknown_routes_say_what_there_is(url: str) -> None:
    assert "/generate" in httpx.get(f"{url}/v2/chat").json()["detail"]
    assert "/v1/completions" in httpx.post(f"{url}/v1/embeddings", json={}).json()["error"]["message"]
    assert "it takes POST" in httpx.get(f"{url}/generate").json()["detail"]


def test_created_is_when_the_model_was_loaded(url: str) -> None:
    created = httpx.get(f"{url}/v1/models").json()["data"][0]["created"]
    assert abs(created - time.time()) < 600


def test_a_request_for_several_stories_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    with running(write_endless_model(tmp_path / "tiny"), rows=1, waiting=3) as url:
        body = {"model": "tiny", "n": 5, "max_tokens": 2000}
        assert httpx.post(f"{url}/v1/completions", json=body | {"prompt": "Tom"}).status_code == 429
        said = [{"role": "user", "content": "Tom"}]
        assert httpx.post(f"{url}/v1/chat/completions", json=body | {"messages": said}).status_code == 429
        load = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "_stories " in line]
        assert sum(float(line.split()[1]) for line in load if not line.startswith("#")) == 0

"""Conversations: prompts, shapes and refusals as the official `openai` client reads them; limits."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from serve.api.chat_schemas import MAX_MESSAGES, ChatRequest
from serve.api.settings import ApiSettings, key_digests
from slm_ray.corpus.instructions import INSTRUCTION_TEMPLATE, instruction_prompt
from slm_ray.generation.engine import Engine
from slm_ray.generation.request import Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs.checkpoint import load_model
from tests.support.http_server import running
from tests.support.tiny_model import write_endless_model, write_tiny_model

KEY = "a-secret-of-many-letters"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[openai.OpenAI]:
    settings = ApiSettings(key_digests=key_digests({"SLM_API_KEYS": KEY}), max_choices=4)
    with running(model, settings) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    options = {"model": "tiny", "max_tokens": 12, "seed": 5, **options}
    return client.chat.completions.create(messages=list(messages) or [user("The cat")], **options)  # type: ignore[call-overload]


def expected(model: Path, prompt: str, **params: object) -> Completion:
    weights, tokenizer = load_model(model)
    sampling = SamplingParams(**{"max_tokens": 12, "temperature": 1.0, "top_k": 0, "seed": 5, **params})  # type: ignore[arg-type]
    return Engine(TorchBackend(weights), tokenizer).generate([prompt], [sampling])[0]


@pytest.mark.parametrize(
    "messages",
    [
        [user("The cat")],
        [{"role": "system", "content": "You are kind."}, user("The cat")],
        [{"role": "developer", "content": [{"type": "text", "text": "Be kind."}]}, user("The cat")],
        [user("Tom"), {"role": "assistant", "content": " ran.", "refusal": None, "tool_calls": None}, user("The cat")],
        [user([{"type": "text", "text": "The cat"}])],
        [{"name": "Ann", **user("The cat")}, {"role": "assistant", "content": None}],
        [
            user([{"type": "text", "text": "Who is it?"}, IMAGE]),
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "tool", "tool_call_id": "1", "content": "5"},
            {"role": "function", "name": "f", "content": [AUDIO]},
            user("The cat"),
            {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "x"}] * 300},
        ],
    ],
)
def test_the_last_user_message_is_the_prompt_of_a_completion(client: openai.OpenAI, messages: list[Any]) -> None:
    answer = chat(client, *messages)
    prompted = client.completions.create(model="tiny", prompt="The cat", max_tokens=12, seed=5)
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", prompted.choices[0].text, None)
    assert answer.choices[0].finish_reason == prompted.choices[0].finish_reason
    assert (answer.object, answer.usage) == ("chat.completion", prompted.usage)
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint == prompted.system_fingerprint


def test_parts_of_a_message_are_its_lines(client: openai.OpenAI) -> None:
    parts = user([{"type": "text", "text": "The cat"}, {"type": "text", "text": "ran"}])
    assert (
        chat(client, parts).choices[0].message.content == chat(client, user("The cat\nran")).choices[0].message.content
    )


def test_a_model_that_learned_with_instructions_is_told_its_instruction(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", template=INSTRUCTION_TEMPLATE)
    own = expected(folder, instruction_prompt("Words: cat"))
    with running(folder) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        answer = chat(client, user("Words: cat"))
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (own.text, own.prompt_tokens)


def test_answers_have_a_seed_each_and_settings_of_the_engine(client: openai.OpenAI, model: Path) -> None:
    answer = chat(client, n=3, top_p=0.9, extra_body={"top_k": 20})
    own = [expected(model, "The cat", seed=5 + number, top_p=0.9, top_k=20) for number in range(3)]
    assert [choice.message.content for choice in answer.choices] == [one.text for one in own]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    written = sum(len(one.tokens) for one in own)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (own[0].prompt_tokens, written)
    options = {"presence_penalty": 1.5, "frequency_penalty": 2.0, "min_p": 0.02, "repetition_penalty": 1.2}
    weighed = expected(model, "The cat", logit_bias=((300 - 1, 3.0), (5, -100.0)), **options)
    named = {name: options.pop(name) for name in ("presence_penalty", "frequency_penalty")}
    biased = chat(client, logit_bias={"299": 3, "5": -100}, extra_body=options, **named)
    assert biased.choices[0].message.content == weighed.text
    completed = client.completions.create(
        model="tiny",
        prompt="The cat",
        max_tokens=12,
        seed=5,
        logit_bias={"299": 3, "5": -100},
        extra_body=options,
        **named,
    )
    assert completed.choices[0].text == weighed.text
    own_route = {"prompt": "The cat", "max_tokens": 12, "seed": 5, "temperature": 1, "top_k": 0, **options, **named}
    body = own_route | {"logit_bias": {"299": 3, "5": -100}}
    headers = {"Authorization": f"Bearer {KEY}"}
    answered = httpx.post(str(client.base_url).removesuffix("v1/") + "generate", json=body, headers=headers)
    assert answered.json()["story"] == "The cat" + weighed.text


def test_a_stream_begins_with_the_role_and_joins_to_the_whole(client: openai.OpenAI) -> None:
    options = {"n": 2, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **options)
    parts = list(chat(client, **options, stream=True, stream_options={"include_usage": True}))
    assert all(part.object == "chat.completion.chunk" and part.id == parts[0].id for part in parts)
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert all(part.usage is None for part in parts[:-1])
    for choice in whole.choices:
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == choice.index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert own[-1].delta.content is None and not any(one.delta.role for one in own[1:])
        tokens = [token for one in own if one.logprobs for token in one.logprobs.content]
        assert tokens == choice.logprobs.content


def test_a_stream_ends_with_done_and_has_no_usage_unasked(client: openai.OpenAI) -> None:
    body = {"model": "tiny", "messages": [user("The cat")], "max_tokens": 3, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{client.base_url}chat/completions", json=body, headers=headers)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    assert not any("usage" in json.loads(line) for line in lines)
    assert len(answer.headers["x-request-id"]) == 32


def test_log_probabilities_are_the_models_and_their_bytes_those_of_the_text(client: openai.OpenAI, model: Path) -> None:
    own = expected(model, "The cat", logprobs=3, logit_bias=((5, 100.0),), max_tokens=3)
    (choice,) = chat(client, logprobs=True, top_logprobs=3, logit_bias={"5": 100}, max_tokens=3).choices
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx(
        [one.logprob for one in own.logprobs], abs=1e-4
    )
    for seed in range(20):  # characters of several tokens, and bytes that form none
        (choice,) = chat(client, logprobs=True, top_logprobs=3, seed=seed, max_tokens=30).choices
        joined = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
        assert joined.decode(errors="replace") == choice.message.content
        assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    (plain,) = chat(client, logprobs=True).choices
    assert all(one.top_logprobs == [] for one in plain.logprobs.content)
    assert chat(client).choices[0].logprobs is None


def test_a_stop_text_ends_the_answer_and_its_tokens(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True).choices[0]
    stop = whole.message.content[3:5]
    cut = chat(client, stop=[stop], logprobs=True).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole.message.content.partition(stop)[0], "stop")
    assert len(cut.logprobs.content) < len(whole.logprobs.content)
    text = b"".join(bytes(one.bytes) for one in cut.logprobs.content).decode(errors="replace")
    assert text.startswith(cut.message.content)


def test_a_long_message_is_read_from_its_newest_half_context(client: openai.OpenAI, model: Path) -> None:
    weights, tokenizer = load_model(model)
    text = "Tom and Mia played. " * 50
    ids = tokenizer.encode(text)[-weights.config.seq_len // 2 :]
    prompted = client.completions.create(model="tiny", prompt=ids, max_tokens=12, seed=5)
    answer = chat(client, user(text))
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (prompted.choices[0].text, 32)


@pytest.mark.parametrize(
    "options, param, message",
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "messages", "nothing that the user says"),
        ({"messages": [user("Tom"), user("")]}, "messages", "nothing that the user says"),
        ({"messages": [user(None)]}, "messages", "nothing that the user says"),
        ({"messages": [user([])]}, "messages", "nothing that the user says"),
        ({"messages": [{"role": "narrator", "content": "Tom"}]}, "messages", "messages.0.role: input should be"),
        ({"messages": [user("a"), {"role": "critic", "content": "5"}]}, "messages", "messages.1.role"),
        ({"messages": [user("a"), "b"]}, "messages", "messages.1"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages", "nothing that the user says"),
        ({"messages": [{"content": "Tom"}]}, "messages", "messages.0.role is required"),
        ({"messages": [user([{"type": "text", "text": "a"}, IMAGE])]}, "messages", "text alone, no 'image_url'"),
        ({"messages": [user([AUDIO])]}, "messages", "text alone, no 'input_audio'"),
        ({"messages": [user([{"type": "text"}])]}, "messages", "messages.0.content.0.text is required"),
        ({"messages": [user(5)]}, "messages", "messages.0.content: input should be a valid string"),
        ({"messages": [user("a")] * (MAX_MESSAGES + 1)}, "messages", f"at most {MAX_MESSAGES} items"),
        ({"model": "gpt-4"}, "model", "no model 'gpt-4'"),
        ({"n": 5}, "n", "1 x 5 stories are more than the 4 of one request"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 13}, "max_completion_tokens", "they differ"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"top_logprobs": 2}, "top_logprobs", "set logprobs to true"),
        ({"logprobs": True, "top_logprobs": 20, "n": 2, "max_tokens": 2048}, "top_logprobs", "more than the 65536"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "token 300 is not one of the 300"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "calls no tools"),
        ({"functions": [{"name": "f"}]}, "functions", "calls no functions"),
        ({"tool_choice": "required"}, "tool_choice", "calls no tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "no JSON"),
        ({"modalities": ["text", "audio"]}, "modalities", "text alone"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"extra_body": {"wishes": 3}}, "wishes", "unknown field 'wishes'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_in_openais_form(
    client: openai.OpenAI, options: dict[str, Any], param: str, message: str
) -> None:
    messages = options.pop("messages", [user("The cat")])
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 2, **options})
    assert error.value.status_code in (400, 404)
    assert (error.value.type, error.value.param) == ("invalid_request_error", param)
    told = error.value.body["message"]  # type: ignore[index]
    assert message in told and "\n" not in told and not any(word in told for word in ("list[", ".str", "tagged"))


def test_what_only_steers_openais_own_service_is_taken(client: openai.OpenAI) -> None:
    tools = {"tools": [{"type": "function"}], "tool_choice": "none", "parallel_tool_calls": True}
    others = {"store": False, "metadata": {"a": "b"}, "user": "ann", "reasoning_effort": "low", "service_tier": "auto"}
    formats = {"response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {}, "presence_penalty": None}
    plain = chat(client).choices[0].message.content
    assert chat(client, **tools, **others, **formats).choices[0].message.content == plain
    nulls = {"audio": None, "web_search_options": None, "a_field_of_tomorrow": None, "stop": [""]}
    assert chat(client, extra_body=nulls).choices[0].message.content == plain
    nothing = {"tools": [], "functions": [], "stop": None, "logprobs": False, "top_logprobs": 0, "n": None}
    assert chat(client, **nothing, extra_body={"stream_options": None}).choices[0].message.content == plain
    assert chat(client, max_tokens=None, max_completion_tokens=12).choices[0].message.content == plain


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="an API key is needed"):
        chat(client.with_options(api_key="wrong"))


def test_a_body_of_wrong_messages_fails_at_the_first() -> None:
    """A body has room for thousands, and each of their mistakes would be an error of its own."""
    for messages in ([{}] * 15_000, [user([{}] * 15_000)], [user("a")] * 2_000, [user([{"type": "text"}] * 4_000)]):
        with pytest.raises(ValidationError) as found:
            ChatRequest.model_validate({"model": "tiny", "messages": messages})
        assert found.value.error_count() <= 2


def test_who_leaves_a_stream_frees_its_slot_and_who_comes_too_late_is_asked_to_retry(tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [user("Once")], "max_tokens": 2048, "seed": 3, "top_k": 50}
    with running(write_endless_model(tmp_path / "tiny"), rows=1, waiting=0) as url:

        def running_stories() -> float:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            return float(next(line.split()[1] for line in lines if line.startswith("slm_running_stories ")))

        with httpx.stream("POST", f"{url}{PATH}", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()  # kept: an iterator that is let go closes the connection
            next(lines)
            late = httpx.post(f"{url}{PATH}", json=body)
            assert (late.status_code, late.headers["Retry-After"]) == (429, "2")
            assert late.json()["error"]["code"] == "rate_limit_exceeded"
        deadline = time.monotonic() + 20
        while running_stories():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        whole = httpx.post(f"{url}{PATH}", json=body | {"max_tokens": 2})
        assert whole.json()["choices"][0]["finish_reason"] == "length"

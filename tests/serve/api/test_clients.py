"""Front ends as people install them against a real server: litellm, LangChain, `llm`, and the calls of Open WebUI.

Their imports take seconds: they are in this file alone, and inside its tests.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.api.settings import ApiSettings, key_digests
from tests.support.http_server import running
from tests.support.tiny_model import write_tiny_model

KEY = "a-secret-of-many-letters"
PROMPT = "The cat"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = write_tiny_model(tmp_path_factory.mktemp("clients") / "tiny")
    settings = ApiSettings(key_digests=key_digests({"SLM_API_KEYS": KEY}))
    with running(model, settings, waiting=60) as address:
        yield f"{address}/v1"


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def story(url: str) -> str:
    """What the server answers to the prompt with seed 5."""
    answer = post(
        url, {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "seed": 5}
    )
    content: str = answer.json()["choices"][0]["message"]["content"]
    assert content
    return content


@pytest.fixture
def event_loop_of_others() -> Iterator[None]:
    """litellm makes an event loop of its own where it finds none, and leaves it open."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.usefixtures("event_loop_of_others")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_litellm(url: str, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network for prices
    import litellm

    options: dict[str, Any] = {"model": "openai/tiny", "api_base": url, "api_key": KEY, "num_retries": 0}
    options |= {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "seed": 5}
    answer = litellm.completion(**options, n=2, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == story
    assert len(answer.choices) == 2 and answer.usage.completion_tokens > 0
    parts = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == story
    assert parts[-1].usage.completion_tokens > 0
    with pytest.raises(litellm.BadRequestError, match="calls no tools"):
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        litellm.completion(**options, tools=tools)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**options | {"api_key": "wrong"})
    text = litellm.text_completion(
        model="text-completion-openai/tiny", prompt=PROMPT, api_base=url, api_key=KEY, seed=5
    )
    assert text.choices[0].text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_langchain(url: str, story: str) -> None:
    import openai
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"model": "tiny", "base_url": url, "api_key": KEY, "max_retries": 0, "max_tokens": 12}
    chat = ChatOpenAI(**options, seed=5)
    answer = chat.invoke([SystemMessage("You tell stories."), HumanMessage(PROMPT)])
    assert answer.content == story
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["total_tokens"] > 0
    assert chat.invoke([HumanMessage([{"type": "text", "text": PROMPT}])]).content == story
    assert [one.content for one in chat.batch([PROMPT, PROMPT, "Tom"])][:2] == [story, story]
    parts = list(chat.stream(PROMPT, stream_usage=True))
    assert "".join(str(part.content) for part in parts) == story
    assert any(part.usage_metadata for part in parts)
    with_logprobs = chat.bind(logprobs=True, top_logprobs=2).invoke(PROMPT)
    assert with_logprobs.response_metadata["logprobs"]["content"]
    penalised = ChatOpenAI(**options, presence_penalty=1, frequency_penalty=1, logit_bias={5: -100}, temperature=0)
    assert penalised.invoke(PROMPT).content
    with pytest.raises(openai.BadRequestError, match="nothing that the user says"):
        chat.invoke([SystemMessage("You tell stories.")])


def test_the_llm_command(url: str, story: str, tmp_path: Path) -> None:
    models = [{"model_id": "stories", "model_name": "tiny", "api_base": url, "api_key_name": "stories"}]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models), encoding="utf-8")
    (tmp_path / "keys.json").write_text(json.dumps({"stories": KEY}), encoding="utf-8")
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}

    def ask(*options: str) -> str:
        command = [sys.executable, "-m", "llm", *options, "-o", "max_tokens", "12", "-o", "seed", "5", PROMPT]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().replace(os.linesep, "\n")

    assert ask("-m", "stories", "-s", "You tell stories.") == f"{story}\n"
    assert ask("-m", "stories", "--no-stream") == f"{story}\n"


_SAID = "<chat_history>\nUSER: A cat called Mia.\nASSISTANT: She found a shiny stone.\n</chat_history>"
_RULE = "- Use the language of the conversation, keep it short, and say nothing before or after it.\n"
TASKS = {
    name: f"### Task:\n{task}\n### Guidelines:\n{_RULE * 12}### Output:\nJSON format: {{}}\n### Chat History:\n{_SAID}"
    for name, task in [
        ("title", "Give this chat a title of three to five words."),
        ("tags", "Give this chat one to three tags."),
        ("follow_up", "Suggest three questions that the user might ask next."),
    ]
}
"""Its tasks in other words: as long as its own, and so longer than the context of most models here."""


def test_what_open_webui_sends_ends_in_no_error(url: str) -> None:
    """Its order of calls (routers/openai.py, routers/tasks.py): models, the chat, then its background tasks."""
    headers = {
        "Authorization": f"Bearer {KEY}",
        "X-OpenWebUI-User-Name": "Ann",
        "X-OpenWebUI-Chat-Id": "6f2b",
        "Content-Type": "application/json",
    }
    (listed,) = httpx.get(f"{url}/models", headers=headers).json()["data"]
    model = listed["id"]
    assert listed["object"] == "model" and httpx.get(f"{url}/models/{model}", headers=headers).status_code == 200
    said = [{"role": "user", "content": "Once upon a time there was a little cat called Mia."}]
    params = {  # what its panel of advanced parameters sets, and a system prompt before the messages
        "temperature": 0.8, "top_p": 0.9, "min_p": 0.0, "max_tokens": 40, "frequency_penalty": 0.5,
        "presence_penalty": 0.0, "reasoning_effort": "medium", "seed": 5, "stop": ["<|end|>"],
        "logit_bias": {"5": -100},
    }  # fmt: skip
    bodies: list[dict[str, Any]] = [
        {"stream": True, "model": model, "messages": said},
        {"stream": True, "model": model, "messages": said, "stream_options": {"include_usage": True}},
        {
            "stream": True,
            "model": model,
            "messages": [{"role": "system", "content": "You tell stories."}, *said],
            **params,
        },
    ]
    for body in bodies:
        with httpx.stream("POST", f"{url}/chat/completions", json=body, headers=headers, timeout=60) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
        assert not any("error" in event for event in events)
        written = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
    dialogue = [*said, {"role": "assistant", "content": written}, {"role": "user", "content": "The dragon came."}]
    assert post(url, {"stream": False, "model": model, "messages": dialogue, "max_tokens": 8}).status_code == 200
    for task, prompt in TASKS.items():
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": False}
        answer = post(url, body | ({"max_completion_tokens": 1000} if task == "title" else {}))
        assert answer.status_code == 200, (task, answer.text)
        assert isinstance(answer.json()["choices"][0]["message"]["content"], str)

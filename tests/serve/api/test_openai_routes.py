"""The official `openai` client, unchanged, against our routes: whole, streamed, and rejected."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from serve.api.settings import ApiSettings, key_digests
from slm_ray.generation.engine import Engine
from slm_ray.generation.request import Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs.checkpoint import load_model
from tests.support.http_server import running
from tests.support.tiny_model import write_endless_model, write_tiny_model

KEY = "a-secret-of-many-letters"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[openai.OpenAI]:
    settings = ApiSettings(key_digests=key_digests({"SLM_API_KEYS": f"{KEY},another-secret"}), max_choices=4)
    with running(model, settings) as url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def expected(model: Path, prompt: str, **params: object) -> Completion:
    weights, tokenizer = load_model(model)
    sampling = SamplingParams(**{"max_tokens": 12, "temperature": 1.0, "top_k": 0, **params})  # type: ignore[arg-type]
    return Engine(TorchBackend(weights), tokenizer).generate([prompt], [sampling])[0]


def test_every_token_has_its_logprob_and_its_place_also_parts_of_characters(client: openai.OpenAI) -> None:
    prompt = "“Tom” said 🦊 naïve"
    options = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "seed": 5, "logprobs": 0, "echo": True}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    logprobs = whole.choices[0].logprobs
    assert len(logprobs.token_logprobs) == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    places = list(zip(logprobs.tokens, logprobs.text_offset, strict=True))
    plain = [(token, at) for token, at in places[: whole.usage.prompt_tokens] if "\ufffd" not in token]
    assert len(plain) > 5
    assert all(prompt[at:].startswith(token) for token, at in plain)
    streamed = [part.choices[0].logprobs for part in client.completions.create(**options, stream=True)]  # type: ignore[call-overload]
    assert [at for one in streamed if one for at in one.text_offset] == logprobs.text_offset


def test_what_openais_client_may_send_is_taken(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    parts = list(
        client.completions.create(
            model="tiny",
            prompt=None,
            max_tokens=3,
            seed=-1,
            stream=True,
            stream_options=options,  # type: ignore[call-overload]
        )
    )
    assert parts[-1].usage.completion_tokens <= 3
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny", prompt=3, max_tokens=3)  # type: ignore[call-overload]
    assert error.value.param == "prompt"


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slm-ray"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'") as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_a_story_is_the_engines(client: openai.OpenAI, model: Path) -> None:
    answer = client.completions.create(model="tiny", prompt="The cat", max_tokens=12, seed=5, top_p=0.9)
    own = expected(model, "The cat", seed=5, top_p=0.9)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (own.text, own.finish_reason)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (own.prompt_tokens, len(own.tokens))
    assert answer.usage.total_tokens == own.prompt_tokens + len(own.tokens)


def test_several_prompts_and_stories_each_with_its_seed(client: openai.OpenAI, model: Path) -> None:
    answer = client.completions.create(model="tiny", prompt=["The cat", "Tom"], n=2, max_tokens=12, seed=5, echo=True)
    texts = [prompt + expected(model, prompt, seed=seed).text for prompt in ("The cat", "Tom") for seed in (5, 6)]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_tokens_are_prompts_too(client: openai.OpenAI, model: Path) -> None:
    _, tokenizer = load_model(model)
    ids = tokenizer.encode("The cat")
    answers = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=5, echo=True)  # type: ignore[call-overload]
        for prompt in ("The cat", ids, [ids])
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1


def test_a_stream_joins_to_the_whole_and_counts(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "prompt": ["The cat", "Tom"], "max_tokens": 12, "seed": 5, "logprobs": 2, "echo": True}
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    texts, tokens, reasons, usage = ["", ""], [[], []], ["", ""], None
    for part in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_logprobs_are_in_openais_shape(client: openai.OpenAI, model: Path) -> None:
    answer = client.completions.create(model="tiny", prompt="The cat", max_tokens=12, seed=5, logprobs=3, echo=True)
    own = expected(model, "The cat", seed=5, logprobs=3, prompt_logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    both = [*own.prompt_logprobs, *own.logprobs]
    assert logprobs.token_logprobs == pytest.approx([one.logprob for one in both], abs=1e-4)
    assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
    assert all(len(top) <= 4 for top in logprobs.top_logprobs)
    measured = client.completions.create(model="tiny", prompt="The cat", max_tokens=0, logprobs=0, echo=True)
    assert measured.choices[0].text == "The cat"


def test_a_stop_text_ends_the_story(client: openai.OpenAI, model: Path) -> None:
    whole = expected(model, "The cat", seed=5).text
    stop = whole[3:5]
    answer = client.completions.create(model="tiny", prompt="The cat", max_tokens=12, seed=5, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "options, param, message",
    [
        ({"model": "gpt-4"}, "model", "no model 'gpt-4'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"n": 10**9}, "n", "less than or equal to 128"),
        ({"n": 5}, "n", "1 x 5 stories are more than the 4 of one request"),
        ({"best_of": 3}, "best_of", "best_of is not supported"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "token 300 is not one of the 300"),
        ({"logit_bias": {"cat": 1}}, "logit_bias", "must be token ids"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "at most 1024"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"extra_body": {"min_p": 1.5}}, "min_p", "less than or equal to 1"),
        ({"prompt": []}, "prompt", "1 to 64 prompts"),
        ({"prompt": [10**6]}, "prompt", "is not one of the"),
        ({"prompt": "x" * 64}, "prompt", "has 64 tokens"),
        ({"extra_body": {"wishes": 3}}, "wishes", "unknown field 'wishes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    ],
)
def test_a_mistake_is_reported_in_openais_form(
    client: openai.OpenAI, options: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as error:
        client.completions.create(**{"model": "tiny", "prompt": "The cat", "max_tokens": 2, **options})  # type: ignore[call-overload]
    assert error.value.status_code in (400, 404)
    assert (error.value.type, error.value.param) == ("invalid_request_error", param)


def test_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="an API key is needed"):
        client.with_options(api_key="wrong").models.list()


def test_too_many_at_once_are_asked_to_retry(tmp_path: Path) -> None:
    with running(write_endless_model(tmp_path / "tiny"), rows=1, waiting=0) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.RateLimitError, match="try again later") as error:
            client.completions.create(model="tiny", prompt=["Tom", "Mia"], max_tokens=2000, temperature=0)
        assert error.value.response.headers["Retry-After"] == "2"
        client.close()

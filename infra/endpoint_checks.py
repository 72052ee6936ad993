"""What is asked of an endpoint, and what its answers must be.

In: an `Endpoint`. Out: for each check a sentence, or a `CheckError` that says what was expected and what came. The
later ones compare with what the earlier ones saw: a stream with the whole story of the same seed, one route with the
other.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from infra.endpoint_client import Answer, Endpoint
from slm_ray.errors import visible

NUMBER = (int, float)
Shape = Mapping[str, type | tuple[type, ...]]
VERSION: Shape = {"name": str, "version": str, "run_id": str, "data_fingerprint": str}
MODEL: Shape = {**VERSION, "step": int, "parameters": int, "seq_len": int, "vocab_size": int, "rollout": dict}
USAGE: Shape = {"prompt_tokens": int, "completion_tokens": int, "seconds": NUMBER, "tokens_per_second": NUMBER}
STORY: Shape = {"story": str, "finish_reason": str, "model": dict, "usage": dict}
LAST_EVENT: Shape = {"done": bool, "finish_reason": str, "model": dict, "usage": dict}
COMPLETION: Shape = {"id": str, "object": str, "created": int, "model": str, "choices": list}
OPENAI_USAGE: Shape = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
KEY_STATUSES = (401, 403)


class CheckError(Exception):
    """An answer is not what it must be."""


class NotAskedError(Exception):
    """What it is to be compared with is not there."""


class KeyRefusedError(Exception):
    """The endpoint asks for a key, or for another one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """The story that is asked for, again and again."""

    text: str = "Once upon a time"
    max_tokens: int = 40
    seed: int = 1

    def body(self, **changes: object) -> dict[str, object]:
        """The fields that both routes have."""
        sampling = {"temperature": 0.7, "top_k": 50, "top_p": 1.0, "seed": self.seed}
        return {"prompt": self.text, "max_tokens": self.max_tokens, **sampling, **changes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A story as one of the routes gave it, without its prompt."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Checks:
    """The checks in their order, and what they have seen so far."""

    def __init__(self, endpoint: Endpoint, prompt: Prompt) -> None:
        self._endpoint, self._prompt = endpoint, prompt
        self._model: dict[str, Any] | None = None
        self._whole: Written | None = None

    def health(self) -> str:
        """`GET /health`."""
        _need(_object(self._ask("GET", "/health"), {"status": str})["status"] == "ok", "status is not ok")
        return "alive"

    def ready(self) -> str:
        """`GET /ready`."""
        _need(_object(self._ask("GET", "/ready"), {"status": str})["status"] == "ok", "status is not ok")
        return "a model is loaded"

    def model(self) -> str:
        """`GET /model`."""
        model = _object(self._ask("GET", "/model"), MODEL)
        for name in ("parameters", "seq_len", "vocab_size"):
            _need(model[name] > 0, f"{name} is {model[name]}")
        rollout = _shaped(model["rollout"], {"state": str, "detail": str}, "rollout")
        self._model = model
        failed = f"; the last change of it failed: {rollout['detail']}" if rollout["state"] == "failed" else ""
        return f"{model['name']} {model['version']}, {model['parameters']:,} parameters{failed}"

    def models(self) -> str:
        """`GET /v1/models`."""
        content = _object(self._ask("GET", "/v1/models"), {"object": str, "data": list})
        _need(content["object"] == "list", "object is not list")
        names = [_shaped(one, {"id": str, "object": str}, "data")["id"] for one in content["data"]]
        _need(bool(names), "no model is listed")
        _need(self._model is None or self._model["name"] in names, f"lists {names} and not the model of /model")
        return ", ".join(names)

    def story(self) -> str:
        """`POST /generate`, whole."""
        self._whole = self._story()
        speed = f"{self._whole.prompt_tokens} + {self._whole.completion_tokens} tokens"
        return f"{speed}, {self._whole.finish_reason}: {self._whole.text.strip()[:40]!r}"

    def same_story(self) -> str:
        """`POST /generate` again: one seed writes one story."""
        _same(self._story(), self._seen(), "two answers with one seed")
        return "one seed, one story"

    def streamed_story(self) -> str:
        """`POST /generate` as a stream: the pieces are the story, and the last event counts it."""
        answer = self._ask("POST", "/generate", self._prompt.body(stream=True))
        events = _events(answer)
        _need("done" in events[-1], "the stream ends without its last event (done)")
        last = _shaped(events[-1], LAST_EVENT, "the last event")
        self._check_version(last["model"])
        text = "".join(_shaped(event, {"text": str}, "an event")["text"] for event in events[:-1])
        _same(self._written(text, last["finish_reason"], last["usage"], USAGE), self._seen(), "stream and whole story")
        return f"{len(events) - 1} pieces, the first after {answer.first_s:.2f} s"

    def completion(self) -> str:
        """`POST /v1/completions`, whole: the same story by the other route."""
        content = _object(self._ask("POST", "/v1/completions", self._openai_body()), {**COMPLETION, "usage": dict})
        _need(content["object"] == "text_completion", f"object is {content['object']!r}")
        _need(len(content["choices"]) == 1, f"{len(content['choices'])} choices for one that was asked for")
        choice = _shaped(content["choices"][0], {"text": str, "index": int, "finish_reason": str}, "a choice")
        written = self._written(choice["text"], choice["finish_reason"], content["usage"], OPENAI_USAGE)
        _same(written, self._seen(), "/v1/completions and /generate")
        return "the story of /generate"

    def streamed_completion(self) -> str:
        """`POST /v1/completions` as a stream with `include_usage`."""
        body = self._openai_body(stream=True, stream_options={"include_usage": True})
        chunks = [_shaped(one, COMPLETION, "a chunk") for one in _events(self._ask("POST", "/v1/completions", body))]
        choices = [
            _shaped(choice, {"text": str, "index": int}, "a choice") for one in chunks for choice in one["choices"]
        ]
        ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        _need(len(ends) == 1, f"{len(ends)} chunks with a finish_reason, expected one")
        usage = [one["usage"] for one in chunks if one.get("usage")]
        _need(len(usage) == 1, f"{len(usage)} chunks with usage, expected one")
        text = "".join(choice["text"] for choice in choices)
        _same(self._written(text, ends[0], usage[0], OPENAI_USAGE), self._seen(), "stream and whole story")
        return f"{len(chunks)} chunks"

    def mistake(self) -> str:
        """A body that is wrong is the asker's fault, said in a sentence, at both routes."""
        ours = self._ask("POST", "/generate", {"prompt": 5}, status=422)
        _object(ours, {"detail": str})
        theirs = self._ask("POST", "/v1/completions", self._openai_body(max_tokens=-1), status=400)
        error = _shaped(_object(theirs, {"error": dict})["error"], {"message": str, "type": str}, "error")
        return f"refused with 422 and 400: {error['message'][:60]}"

    def _ask(self, method: str, path: str, content: object = None, *, status: int = 200) -> Answer:
        answer = self._endpoint.ask(method, path, content)
        if answer.status in KEY_STATUSES:
            raise KeyRefusedError(f"{path} answered {answer.status}")
        if answer.status != status:
            said = visible(answer.body[:200].decode("utf-8", "replace")).strip()
            raise CheckError(f"answered {answer.status}, expected {status}: {said}")
        return answer

    def _story(self) -> Written:
        content = _object(self._ask("POST", "/generate", self._prompt.body()), STORY)
        self._check_version(content["model"])
        story: str = content["story"]
        _need(story.startswith(self._prompt.text), f"the story does not begin with the prompt: {story[:60]!r}")
        text = story[len(self._prompt.text) :]
        return self._written(text, content["finish_reason"], content["usage"], USAGE)

    def _written(self, text: str, finish_reason: object, usage: object, shape: Shape) -> Written:
        """Check the counts of a story. Raises CheckError."""
        counts, most = _shaped(usage, shape, "usage"), self._prompt.max_tokens
        written, read = counts["completion_tokens"], counts["prompt_tokens"]
        _need(finish_reason in ("stop", "length"), f"finish_reason is {finish_reason!r}, expected stop or length")
        _need(0 <= written <= most, f"{written} tokens written of at most {most}")
        _need(finish_reason == "stop" or written == most, f"finish_reason is length after {written} of {most} tokens")
        _need(read >= 0 and (read > 0 or not self._prompt.text), f"{read} tokens in the prompt")
        total = counts.get("total_tokens", read + written)
        _need(total == read + written, f"total_tokens is {total}, and {read} + {written} are its parts")
        return Written(text=text, finish_reason=str(finish_reason), prompt_tokens=read, completion_tokens=written)

    def _openai_body(self, **changes: object) -> dict[str, object]:
        if self._model is None:
            raise NotAskedError("which model to name is not known")
        return self._prompt.body(model=self._model["name"], **changes)

    def _check_version(self, content: object) -> None:
        """Stories of two versions are not to be compared."""
        version = _shaped(content, VERSION, "model")
        if self._model is not None and version["version"] != self._model["version"]:
            changed = f"{self._model['version']} to {version['version']}"
            raise CheckError(f"the model changed from {changed} meanwhile: check again")

    def _seen(self) -> Written:
        if self._whole is None:
            raise NotAskedError("there is no whole story to compare with")
        return self._whole


def _need(is_true: bool, otherwise: str) -> None:
    if not is_true:
        raise CheckError(visible(otherwise))


def _same(got: Written, whole: Written, what: str) -> None:
    for field in dataclasses.fields(Written):
        one, other = getattr(got, field.name), getattr(whole, field.name)
        _need(one == other, f"{what} differ in {field.name}: {str(one)[:60]!r} and {str(other)[:60]!r}")


def _object(answer: Answer, shape: Shape) -> dict[str, Any]:
    """The body of an answer as an object of that shape."""
    _need(answer.content_type == "application/json", f"its type is {answer.content_type!r}, expected application/json")
    try:
        content = answer.json()
    except (ValueError, RecursionError) as error:
        raise CheckError(f"the body is no JSON: {answer.body[:60]!r}") from error
    return _shaped(content, shape, "the body")


def _shaped(content: object, shape: Shape, what: str) -> dict[str, Any]:
    """The content, if it is an object with these fields of these types; others may be there too."""
    if not isinstance(content, dict):
        raise CheckError(visible(f"{what} is no object: {str(content)[:60]!r}"))
    for name, kind in shape.items():
        _need(name in content, f"{what} lacks {name}")
        value = content[name]
        is_right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        _need(is_right, f"{name} in {what} is {str(value)[:60]!r}, which is not of its type")
    return content


def _events(answer: Answer) -> list[dict[str, Any]]:
    """The events of a stream as objects, without the `[DONE]` that ends those of OpenAI's routes."""
    kind = answer.content_type
    _need(kind == "text/event-stream", f"its type is {kind!r}, expected text/event-stream")
    try:
        data = answer.events()
        is_openai = data[-1:] == ["[DONE]"]
        events = [json.loads(one) for one in (data[:-1] if is_openai else data)]
    except (ValueError, RecursionError) as error:
        raise CheckError(f"an event is no JSON: {_end(answer.body)}") from error
    _need(bool(events), "the stream is empty")
    for event in events:
        _need(isinstance(event, dict), f"an event is no object: {str(event)[:60]!r}")
        if "error" in event:
            raise CheckError(visible(f"the stream says: {str(event['error'])[:200]}"))
    _need(is_openai or "choices" not in events[-1], "the stream ends without [DONE]")
    return events


def _end(body: bytes) -> str:
    """The last bytes of a stream, to be shown."""
    return repr(body[-60:])

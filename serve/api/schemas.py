"""What goes over the wire at our own routes: the fields of requests and answers, with their ranges.

In: JSON bodies. Out: checked values, or one sentence that says what is wrong. `routes.py` uses them, OpenAPI shows
them; `openai_schemas.py` has those of the OpenAI routes.
"""

import re
from typing import Annotated, Any, Literal, TypeAlias

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from serve.models.description import ModelVersion
from slm_ray.generation.logprobs import TokenLogprob
from slm_ray.generation.sampling import (
    MAX_BIAS,
    MAX_BIASED,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_SEED,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOKEN_PENALTY,
    MIN_PENALTY,
    SamplingParams,
)

MAX_TOKENS = 2048
_TYPES = frozenset({"str", "int", "float", "bool", "list", "dict", "none"})
_ID = "^(0|[1-9][0-9]{0,9})$"
MAX_STORY_WORDS = 16
Word = Annotated[str, Field(min_length=1, max_length=64)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenPenalty: TypeAlias = Annotated[float, Field(ge=-MAX_TOKEN_PENALTY, le=MAX_TOKEN_PENALTY, allow_inf_nan=False)]


def _check_biases(value: Any) -> Any:
    """End the look at a body's biases at the first wrong one: it has room for 10,000."""
    if isinstance(value, dict):
        if len(value) > MAX_BIASED:
            raise PydanticCustomError("too_many", f"it has {len(value)} tokens, at most {MAX_BIASED} are allowed")
        if any(not re.fullmatch(_ID, token) for token in value):
            raise PydanticCustomError("token_id", 'its keys must be token ids, as "262"')
    return value


LogitBias: TypeAlias = Annotated[
    dict[
        Annotated[str, Field(pattern=_ID)],
        Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS, allow_inf_nan=False)],
    ],
    Field(max_length=MAX_BIASED, description="Added to the logits of these token ids, before all penalties."),
    BeforeValidator(_check_biases),
]


def biases(given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """The engine's form of a body's biases."""
    return tuple((int(token), bias) for token, bias in (given or {}).items())


class GenerateRequest(BaseModel):
    """How to write one story."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field(description="Beginning of the story; empty lets the model begin.")
    words: Annotated[list[Word], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_STORY_WORDS,
        description="Words that the story should use, of a model with instructions; none of them lets it choose.",
    )
    max_tokens: int = Field(50, ge=1, le=MAX_TOKENS, description="Most tokens to write after the prompt.")
    temperature: float = Field(
        0.7, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False, description="Higher is more surprising; 0 is greedy."
    )
    top_k: int = Field(50, ge=0, description="Draw among this many likeliest tokens; 0 among all.")
    top_p: float = Field(
        1.0, gt=0, le=1, allow_inf_nan=False, description="Draw among the likeliest that reach this probability."
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Draw among tokens at least this times as likely as the likeliest.",
    )
    repetition_penalty: float = Field(
        1.0,
        ge=MIN_PENALTY,
        le=MAX_PENALTY,
        allow_inf_nan=False,
        description="Weighs down tokens that were there; 1 does not.",
    )
    presence_penalty: TokenPenalty = Field(0.0, description="Taken from the logit of every token that was written.")
    frequency_penalty: TokenPenalty = Field(0.0, description="The same for each time that it was written.")
    logit_bias: LogitBias = {}
    stop: Annotated[list[StopText], Field(fail_fast=True)] = Field(
        [], max_length=MAX_STOPS, description="Texts that end the story before them."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed writes the same story.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Give each token's log-probability, and this many likelier ones."
    )
    stream: bool = Field(False, description="Answer with server-sent events, a piece of the story each.")

    def sampling(self) -> SamplingParams:
        """The engine's form of it."""
        values = self.model_dump(exclude={"prompt", "words", "stream", "stop", "logit_bias"})
        return SamplingParams(**values, stop=tuple(self.stop), logit_bias=biases(self.logit_bias))


class Usage(BaseModel):
    """What a story took."""

    prompt_tokens: int = Field(description="Tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens written.")
    seconds: float = Field(description="Time from the request to the last token, waiting included.")
    tokens_per_second: float = Field(description="Tokens written over that time.")


class TokenChance(BaseModel):
    """A token and the logarithm of the probability that the model gave it."""

    text: str
    logprob: float


class WrittenToken(TokenChance):
    """A token of the story with the likeliest ones in its place."""

    top: list[TokenChance]


class GenerateAnswer(BaseModel):
    """A story."""

    story: str = Field(description="The prompt and its continuation.")
    finish_reason: Literal["stop", "length"] = Field(description="It ended by itself, or max_tokens were written.")
    model: ModelVersion
    usage: Usage
    tokens: list[WrittenToken] | None = Field(None, description="The written tokens, where logprobs were asked for.")


class Health(BaseModel):
    """The server is alive."""

    status: Literal["ok"] = "ok"


class ErrorAnswer(BaseModel):
    """What is wrong, in a sentence."""

    detail: str


def written_tokens(logprobs: tuple[TokenLogprob, ...]) -> list[WrittenToken]:
    """The form in which tokens go over the wire."""
    return [
        WrittenToken(
            text=one.text,
            logprob=one.logprob,
            top=[TokenChance(text=text, logprob=logprob) for _, text, logprob in one.top],
        )
        for one in logprobs
    ]


def sentence(error: RequestValidationError, fields: str) -> str:
    """The first fault of a body, in words: what was expected of which of its `fields`."""
    first: dict[str, Any] = error.errors()[0]
    kind, field = first["type"], field_name(error)
    if kind == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {field}"
    if kind == "extra_forbidden":
        return f"unknown field {field[:50]!r}: expected {fields}"
    if not field:
        return f"the body must be a JSON object with the fields {fields}, sent as application/json"
    if kind == "missing":
        return f"{field} is required"
    message: str = first["msg"]
    return f"{field}: {message[:1].lower()}{message[1:]}"


def field_name(error: RequestValidationError) -> str:
    """Where the first fault of a body is, as `stop.0`, without the validator's own words for types."""
    loc = error.errors()[0]["loc"][1:]
    inner = [part for part in loc[1:] if isinstance(part, int) or (part.isidentifier() and part not in _TYPES)]
    return ".".join(str(part) for part in [*loc[:1], *inner])[:100]

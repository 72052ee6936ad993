"""What goes over the wire at the OpenAI routes: `POST /v1/completions` and `GET /v1/models`.

In: JSON bodies. Out: checked values. The names and shapes are OpenAI's (platform.openai.com/docs/api-reference,
completions); `top_k` and `repetition_penalty` are extensions, as vLLM has them.
"""

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from serve.api.schemas import MAX_TOKENS, StopText
from slm_ray.generation.sampling import MAX_PENALTY, MAX_SEED, MAX_STOP_LENGTH, MIN_PENALTY, SamplingParams

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16
TokenId = Annotated[int, Field(ge=0, le=2**31)]
_Item = TypeVar("_Item")
_Many: TypeAlias = Annotated[list[_Item], Field(fail_fast=True)]
"""A list whose first wrong item ends the look at it: a body has room for 65,000."""
OpenaiStop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
_SMALLEST_TOP_P = 1e-9
"""What a top_p of 0 means: the likeliest token reaches it alone."""


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(None, description="End with a chunk that counts the tokens.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class CompletionRequest(BaseModel):
    """OpenAI's fields. Those that this server cannot honour are accepted at the value that changes nothing."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = Field(description="A name that `GET /v1/models` lists.")
    prompt: str | _Many[str] | _Many[TokenId] | _Many[_Many[TokenId]] | None = Field(
        None, description="One beginning or several, as text or as tokens; none lets the model begin."
    )
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Most tokens to write; 16 when not given.")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="The same, by its newer name.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0 takes the likeliest token.")
    n: int | None = Field(None, ge=1, le=128, description="Stories for every prompt.")
    stop: OpenaiStop | _Many[StopText] | None = Field(
        None, description="Up to 4 texts that end the story before them; an empty text ends nothing."
    )
    seed: int | None = Field(
        None, ge=-MAX_SEED - 1, le=MAX_SEED, description="Story number i of a prompt takes seed + i."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=5)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and not used.")
    best_of: int | None = Field(None, description="Must be n.")
    suffix: Literal[""] | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    top_k: int | None = Field(
        None, ge=-1, description="Extension: draw among this many likeliest tokens; 0, -1 and null among all."
    )
    repetition_penalty: float | None = Field(
        None, ge=MIN_PENALTY, le=MAX_PENALTY, allow_inf_nan=False, description="Extension."
    )

    @property
    def count(self) -> int:
        """Stories for every prompt."""
        return self.n or 1

    def prompts(self) -> list[str | list[int]]:
        """All of them, one by one."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(filter(None, given))

    @property
    def most_tokens(self) -> int:
        """Most tokens of a story."""
        given = (self.max_tokens, self.max_completion_tokens)
        return next((value for value in given if value is not None), DEFAULT_MAX_TOKENS)

    def sampling(self, number: int) -> SamplingParams:
        """The engine's form of it, for story `number` of a prompt, of which the first alone measures the prompt."""
        top_p = 1.0 if self.top_p is None else max(self.top_p, _SMALLEST_TOP_P)
        wants_prompt = self.most_tokens == 0 or (bool(self.echo) and self.logprobs is not None and number == 0)
        return SamplingParams(
            max_tokens=self.most_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p,
            top_k=max(self.top_k or 0, 0),
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=self.stops(),
            seed=None if self.seed is None else (self.seed + number) % (MAX_SEED + 1),
            logprobs=self.logprobs,
            prompt_logprobs=wants_prompt,
        )


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    """One story, or a piece of one."""

    text: str
    index: int
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionUsage(BaseModel):
    """Tokens of all prompts and all stories."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionAnswer(BaseModel):
    """Stories, or in a stream a piece of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Version of the model, and the data set it was trained on.")
    choices: list[Choice]
    usage: CompletionUsage | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970 when it was loaded.")
    owned_by: str = "slm-ray"


class ModelList(BaseModel):
    """The models that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class OpenaiErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenaiError(BaseModel):
    """OpenAI's form of a refusal."""

    error: OpenaiErrorBody


def chunk_content(answer: CompletionAnswer, *, with_usage: bool) -> dict[str, Any]:
    """The JSON of one event of a stream: `usage` is there, as null, only where the stream ends with one."""
    content = answer.model_dump()
    if not with_usage:
        del content["usage"]
    return content

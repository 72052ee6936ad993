"""What goes over the wire at the OpenAI routes: what all of them share, and `POST /v1/completions`.

In: JSON bodies. Out: checked values. The names and shapes are OpenAI's (platform.openai.com/docs/api-reference,
completions); `top_k`, `min_p` and `repetition_penalty` are extensions, as vLLM has them. `chat_schemas.py` has those of
a conversation.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.api.schemas import MAX_TOKENS, LogitBias, TokenPenalty, biases
from slm_ray.generation.sampling import MAX_PENALTY, MAX_SEED, MAX_STOP_LENGTH, MIN_PENALTY, SamplingParams

MAX_PROMPTS = 64
TokenId = Annotated[int, Field(ge=0, le=2**31)]
_Item = TypeVar("_Item")
Many: TypeAlias = Annotated[list[_Item], Field(fail_fast=True)]
"""A list whose first wrong item ends the look at it: a body has room for 65,000."""
OpenaiStop = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
_SMALLEST_TOP_P = 1e-9
"""What a top_p of 0 means: the likeliest token reaches it alone."""


class StreamOptions(BaseModel):
    """What a stream holds besides the text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = Field(None, description="End with a chunk that counts the tokens.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class OpenaiRequest(BaseModel):
    """The fields that all of OpenAI's requests for text have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    default_tokens: ClassVar[int]
    """Most tokens of a story where the request does not say."""

    model: str = Field(description="A name that `GET /v1/models` lists.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="Most tokens to write; 16 when not given.")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="The same, by its newer name.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="0 takes the likeliest token.")
    n: int | None = Field(None, ge=1, le=128, description="Stories for every prompt.")
    stop: OpenaiStop | Many[OpenaiStop] | None = Field(
        None, description="Up to 4 texts that end the story before them; an empty text ends nothing."
    )
    seed: int | None = Field(
        None, ge=-MAX_SEED - 1, le=MAX_SEED, description="Story number i of a prompt takes seed + i."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted and not used.")
    presence_penalty: TokenPenalty | None = Field(
        None, description="Taken from the logit of every token that was written."
    )
    frequency_penalty: TokenPenalty | None = Field(None, description="The same for each time that it was written.")
    logit_bias: LogitBias | None = None
    top_k: int | None = Field(
        None, ge=-1, description="Extension: draw among this many likeliest tokens; 0, -1 and null among all."
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Extension: draw among tokens at least this times as likely as the likeliest.",
    )
    repetition_penalty: float | None = Field(
        None, ge=MIN_PENALTY, le=MAX_PENALTY, allow_inf_nan=False, description="Extension."
    )

    @property
    def count(self) -> int:
        """Stories for every prompt."""
        return self.n or 1

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(filter(None, given))

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, body: Any) -> Any:
        """Clients that write out every field of OpenAI's send null for those that they do not use."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name in cls.model_fields}

    @property
    def most_tokens(self) -> int:
        """Most tokens of a story."""
        given = (self.max_tokens, self.max_completion_tokens)
        return next((value for value in given if value is not None), self.default_tokens)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a count of the tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, number: int, *, logprobs: int | None, prompt_logprobs: bool = False) -> SamplingParams:
        """The engine's form of it, for story `number` of a prompt."""
        return SamplingParams(
            max_tokens=self.most_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else max(self.top_p, _SMALLEST_TOP_P),
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=biases(self.logit_bias),
            stop=self.stops(),
            seed=None if self.seed is None else (self.seed + number) % (MAX_SEED + 1),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(OpenaiRequest):
    """OpenAI's fields. Those that this server cannot honour are accepted at the value that changes nothing."""

    default_tokens = 16

    prompt: str | Many[str] | Many[TokenId] | Many[Many[TokenId]] | None = Field(
        None, description="One beginning or several, as text or as tokens; none lets the model begin."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, description="Must be n.")
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """All of them, one by one."""
        if self.prompt is None or isinstance(self.prompt, str):
            return [self.prompt or ""]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    def sampling(self, number: int) -> SamplingParams:
        """The engine's form of it, for story `number` of a prompt, of which the first alone measures the prompt."""
        wants_prompt = self.most_tokens == 0 or (bool(self.echo) and self.logprobs is not None and number == 0)
        return self.params(number, logprobs=self.logprobs, prompt_logprobs=wants_prompt)


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


class OpenaiAnswer(BaseModel):
    """What every answer begins with."""

    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Version of the model, and the data set it was trained on.")
    usage: CompletionUsage | None = None


class CompletionAnswer(OpenaiAnswer):
    """Stories, or in a stream a piece of one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]


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

"""What goes over the wire at `POST /v1/chat/completions`.

In: JSON bodies. Out: checked values. The names and shapes are OpenAI's (platform.openai.com/docs/api-reference, chat).
What would ask for another kind of answer is refused; what only steers OpenAI's own service is accepted and not used.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from serve.api.openai_schemas import Many, OpenaiAnswer, OpenaiRequest
from serve.api.schemas import MAX_TOKENS
from slm_ray.generation.sampling import MAX_LOGPROBS, SamplingParams

MAX_MESSAGES, MAX_PARTS = 512, 256
DEFAULT_TOKENS = 512
MAX_TOP_LOGPROBS = 65_536
"""Likeliest tokens in all places of all answers: beyond it, writing them down would hold up all other requests."""
_UNUSED = Field(None, description="Accepted and not used.")


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _is_text(cls, kind: Any) -> Any:
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError("part", "this model reads text alone, no {kind}", {"kind": repr(kind[:50])})
        return kind


Content: TypeAlias = Annotated[
    Annotated[str, Tag("str")] | Annotated[Annotated[Many[TextPart], Field(max_length=MAX_PARTS)], Tag("list")],
    Discriminator(lambda content: "list" if isinstance(content, list) else "str"),
]
"""Text, or pieces of it. The tag says which was meant, so that a mistake is said once."""


class Message(BaseModel):
    """What somebody said, or what a tool answered. Other fields that clients send back are not read."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    """Of the user's last message; of all others it may be anything, and is left out."""

    @property
    def text(self) -> str:
        """All of it; pieces are lines, as in vLLM and llama.cpp."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class ChatRequest(OpenaiRequest):
    """OpenAI's fields. The last message of the user is the beginning of the story."""

    default_tokens = DEFAULT_TOKENS

    messages: Annotated[Many[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="Most tokens to write; 512 when not given.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="The same, by its newer name.")
    logprobs: bool | None = Field(None, description="Give each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Give this many likeliest beside it.")
    tools: list[Any] | None = Field(None, description="Only where tool_choice is none: this model calls nothing.")
    tool_choice: Any = None
    functions: list[Any] | None = Field(None, description="Only where function_call is none.")
    function_call: Any = None
    response_format: dict[str, Any] | None = Field(None, description="Only text.")
    modalities: list[str] | None = Field(None, description="Only text.")
    parallel_tool_calls: Any = _UNUSED
    store: Any = _UNUSED
    metadata: Any = _UNUSED
    service_tier: Any = _UNUSED
    reasoning_effort: Any = _UNUSED
    verbosity: Any = _UNUSED
    prediction: Any = _UNUSED
    prompt_cache_key: Any = _UNUSED
    prompt_cache_retention: Any = _UNUSED
    safety_identifier: Any = _UNUSED

    @field_validator("messages", mode="before")
    @classmethod
    def _without_unread(cls, messages: Any) -> Any:
        if not isinstance(messages, list) or len(messages) > MAX_MESSAGES:
            return messages
        own = [place for place, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "user"]
        return [
            one if place in own[-1:] or not isinstance(one, dict) else {**one, "content": None}
            for place, one in enumerate(messages)
        ]

    @property
    def last_said(self) -> str:
        """The user's last message, empty where there is none."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    def sampling(self, number: int) -> SamplingParams:
        """The engine's form of it, for story `number`."""
        return self.params(number, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class TopLogprob(TypedDict):
    """A token that might stand there; `bytes` are its own, which join to those of the text."""

    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    """A token of the text."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a text."""

    content: list[ChatLogprob]
    refusal: None = None


class Answer(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One story."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(OpenaiAnswer):
    """Stories."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    """A piece of one story in a stream."""

    index: int
    delta: dict[str, str] = Field(description="`role` first, then pieces of the `content`, and nothing at the end.")
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(OpenaiAnswer):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDelta]

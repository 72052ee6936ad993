"""What goes over the wire: the fields of requests and answers, with their ranges.

In: JSON bodies. Out: checked values, or one sentence that says what is wrong. `api.py` uses them, OpenAPI shows them.
"""

from typing import Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

from slm_ray.sampling import MAX_SEED, MAX_TEMPERATURE, SamplingParams

MAX_TOKENS = 2048


class GenerateRequest(BaseModel):
    """How to write one story."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field(description="Beginning of the story; empty lets the model begin.")
    max_tokens: int = Field(50, ge=1, le=MAX_TOKENS, description="Most tokens to write after the prompt.")
    temperature: float = Field(
        0.7, ge=0, le=MAX_TEMPERATURE, allow_inf_nan=False, description="Higher is more surprising; 0 is greedy."
    )
    top_k: int = Field(50, ge=0, description="Draw among this many likeliest tokens; 0 among all.")
    top_p: float = Field(
        1.0, gt=0, le=1, allow_inf_nan=False, description="Draw among the likeliest that reach this probability."
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed writes the same story.")

    def sampling(self) -> SamplingParams:
        """The engine's form of it."""
        return SamplingParams(**self.model_dump(exclude={"prompt"}))


_FIELDS = ", ".join(GenerateRequest.model_fields)


class ModelVersion(BaseModel):
    """Which model wrote it, and from which stories that model was made."""

    name: str = Field(description="Registered name, or that of the run.")
    version: str = Field(description="Registered version, or the step of the checkpoint.")
    run_id: str = Field(description="Run of the tracker, empty without one.")
    data_fingerprint: str = Field(description="Fingerprint of the data set it was trained on.")


class RolloutStatus(BaseModel):
    """How the last change of the version went."""

    state: Literal["serving", "loading", "failed"] = Field(
        default="serving", description="Failed: the version pointed to is not served, the one before goes on."
    )
    detail: str = Field(default="", description="What happened, in words.")


class ModelDescription(ModelVersion):
    """The model being served."""

    step: int = Field(description="Training steps behind it.")
    parameters: int = Field(description="Trainable weights.")
    seq_len: int = Field(description="Context in tokens.")
    vocab_size: int = Field(description="Entries of the tokenizer.")
    evaluation: dict[str, float] = Field({}, description="Metrics of its validation.")
    rollout: RolloutStatus = Field(RolloutStatus(), description="The last change of the version.")


class Usage(BaseModel):
    """What a story took."""

    prompt_tokens: int = Field(description="Tokens of the prompt.")
    completion_tokens: int = Field(description="Tokens written.")
    seconds: float = Field(description="Time from the request to the last token, waiting included.")
    tokens_per_second: float = Field(description="Tokens written over that time.")


class GenerateAnswer(BaseModel):
    """A story."""

    story: str = Field(description="The prompt and its continuation.")
    finish_reason: Literal["stop", "length"] = Field(description="It ended by itself, or max_tokens were written.")
    model: ModelVersion
    usage: Usage


class Health(BaseModel):
    """The server is alive."""

    status: Literal["ok"] = "ok"


class ErrorAnswer(BaseModel):
    """What is wrong, in a sentence."""

    detail: str


def sentence(error: RequestValidationError) -> str:
    """The first fault of a body, in words: what was expected of which field."""
    first = error.errors()[0]
    kind, field = first["type"], ".".join(str(part) for part in first["loc"][1:])
    if kind == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {field}"
    if kind == "extra_forbidden":
        return f"unknown field {field[:50]!r}: expected {_FIELDS}"
    if not field:
        return f"the body must be a JSON object with the fields {_FIELDS}, sent as application/json"
    if kind == "missing":
        return f"{field} is required"
    message: str = first["msg"]
    return f"{field}: {message[:1].lower()}{message[1:]}"

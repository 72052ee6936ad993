"""What a server says about the model behind it: its version, its size, the last change of the version.

In: a checkpoint's record; the rollout's status. Out: pydantic models, which the routes answer with.
"""

import re
from typing import Literal

from pydantic import BaseModel, Field

from slm_ray.errors import UserError, one_line

_ADDRESS = re.compile(r"\w+://[^\s'\"<>]+")
_USER = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_FOLDERS = re.compile(r"(?<!models:)(?<![\w.])/(?:[^\s/:'\"]+/)+")


def for_strangers(text: str) -> str:
    """A text without addresses, which may hold passwords, and without the folders of this machine."""
    return _FOLDERS.sub("", _ADDRESS.sub("(an address)", text))


def without_secrets(text: str) -> str:
    """A text whose addresses have no user, password and query, for the log."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def reason_for_strangers(error: BaseException) -> str:
    """What anybody may read of an error: our own words; those of a library are for the log."""
    return for_strangers(one_line(error)) if isinstance(error, UserError) else "it cannot be loaded"


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
    has_instructions: bool = Field(False, description="Whether it learned instructions, so that `words` may be given.")
    evaluation: dict[str, float] = Field({}, description="Metrics of its validation.")
    rollout: RolloutStatus = Field(RolloutStatus(), description="The last change of the version.")

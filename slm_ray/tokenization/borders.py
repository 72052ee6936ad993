"""What stands before and after a text, in the ids of a tokenizer.

In: a tokenizer of the `tokenizers` package. Out: `TextBorders`: of our own, the end-of-text token on both sides;
those of tokenizers that others made are read by `model_files.foreign_tokenizer`.
"""

import dataclasses
from typing import Any

from slm_ray.errors import UserError

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBorders:
    """What stands before a text and after it, in the ids of a tokenizer."""

    start_id: int
    """The model sees it before a text's first token."""
    eos_id: int
    """Ends a text that is measured or trained on."""
    stop_ids: frozenset[int]
    """Any of these that a model writes ends its text."""
    origin: str = ""
    """Which file said so, of a tokenizer that others made."""

    @property
    def end_ids(self) -> list[int]:
        """The ends as a file lists them: `eos_id` first, and not what only stands before a text."""
        return [self.eos_id, *sorted(self.stop_ids - {self.eos_id, self.start_id})]


def end_of_text_around(inner: Any, name: str) -> TextBorders:
    """The borders of a text of ours. Raises: UserError when the tokenizer has no special token `<|endoftext|>`."""
    token = _eos_id(inner, name)
    return TextBorders(start_id=token, eos_id=token, stop_ids=frozenset({token}))


def _eos_id(inner: Any, name: str) -> int:
    """The id of the end-of-text token, which must be an added special token."""
    for number, token in inner.get_added_tokens_decoder().items():
        if token.content == END_OF_TEXT and token.special:
            return int(number)
    raise UserError(
        f"{name} has no special token {END_OF_TEXT}: without it no model learns where a story ends; "
        "add it to the file's added_tokens, or leave out --tokenizer to train one"
    )

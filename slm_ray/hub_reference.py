"""`hub:NAME[@REVISION][:SPLIT]`: how `--source` and `--tokenizer` name what lies on the Hugging Face hub.

In: a word of the command line. Out: its parts. Asks nobody.
"""

import re
from dataclasses import dataclass

PREFIX = "hub:"
ANSWER_TIMEOUT_S = 4.0
"""How long the hub may take to answer the first question."""

_WORD = re.compile(rf"{PREFIX}(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:\s]+))?(?::(?P<split>[^:\s]+))?")


@dataclass(frozen=True, kw_only=True)
class HubReference:
    """What a word names."""

    name: str  # OWNER/NAME, or NAME alone for the oldest
    revision: str | None  # branch, tag or commit; None: main
    split: str | None  # of a data set; None: all official ones


def parse_hub_reference(word: str) -> HubReference | None:
    """`hub:a/b@v1:train` names `a/b`, `v1` and `train`; None where a word is no such reference."""
    match = _WORD.fullmatch(word)
    return None if match is None else HubReference(**match.groupdict())

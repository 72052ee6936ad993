"""JSON out of a folder that a stranger may have made: of bounded size and depth, and an object.

In: a path. Out: its content.
"""

import json
from pathlib import Path
from typing import Any

from slm_ray.storage import read_at_most

MAX_JSON_BYTES = 4 * 1024 * 1024
"""Of config.json, state.json, the marker and the index of shards: a thousand times what they need."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises: OSError; ValueError when it is none, or too large to be one of ours."""
    text = read_at_most(path, MAX_JSON_BYTES)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is expected, not a {type(content).__name__}")
    return content

"""Licences of stories, as far as a file says them.

In: a manifest's source. Out: an SPDX identifier, or nothing. Nothing is guessed: stories of the user's files have the
licence that their maker gave them, which no manifest knows.
"""

from collections.abc import Mapping
from typing import Any

from slm_ray.dataset.manifest import Manifest, data_sets
from slm_ray.hub_reference import parse_hub_reference

CODE_LICENCE = "Apache-2.0"
HUB_LICENCES = {
    "roneneldan/TinyStories": "CDLA-Sharing-1.0",
    "roneneldan/TinyStoriesInstruct": "CDLA-Sharing-1.0",
}
"""Data sets of the hub and what their own cards said in 2026."""
SAMPLE = "sample"
"""The source of stories that this project makes itself."""
UNKNOWN = "not known: ask whoever made the stories"


def source_licence(source: Mapping[str, Any]) -> str:
    """SPDX identifier of the stories of a source, as a manifest names it; empty where no file says it."""
    used = str(source.get("used") or "")
    if used == SAMPLE:
        return CODE_LICENCE
    named = parse_hub_reference(used)
    return HUB_LICENCES.get(named.name, "") if named is not None else ""


def licence_of(manifest: Manifest) -> str:
    """SPDX identifier of a data set's stories; of a mixture, the one that all have, and empty where they differ."""
    found = {source_licence(its.source) for _, its in data_sets("", manifest)}
    return found.pop() if len(found) == 1 else ""

"""`hub:NAME[@REVISION][:SPLIT]`."""

import pytest

from slm_ray.hub_reference import HubReference, parse_hub_reference


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hub:gpt2", HubReference(name="gpt2", revision=None, split=None)),
        ("hub:a-b/c.d:test", HubReference(name="a-b/c.d", revision=None, split="test")),
        ("hub:a/b@refs/pr/1:train", HubReference(name="a/b", revision="refs/pr/1", split="train")),
    ],
)
def test_a_reference_has_a_name_and_perhaps_a_revision_and_a_split(word: str, expected: HubReference) -> None:
    assert parse_hub_reference(word) == expected


@pytest.mark.parametrize("word", ["a/b", "hub:", "hub:a/b/c", "hub:a b", "hub:a/b:", "hub:a/b@", " hub:a/b"])
def test_other_words_are_none(word: str) -> None:
    assert parse_hub_reference(word) is None

"""The licence of a source is what is known of it, and nothing else."""

import pytest

from slm_ray.dataset.licences import source_licence


@pytest.mark.parametrize(
    ("used", "licence"),
    [
        ("sample", "Apache-2.0"),
        ("hub:roneneldan/TinyStories", "CDLA-Sharing-1.0"),
        ("hub:roneneldan/TinyStories@abc:train", "CDLA-Sharing-1.0"),
        ("hub:mouse/tales", ""),
        ("files", ""),
        ("", ""),
    ],
)
def test_a_licence_is_that_of_the_source_or_not_known(used: str, licence: str) -> None:
    assert source_licence({"used": used}) == licence


def test_a_source_that_says_nothing_has_none() -> None:
    assert source_licence({}) == source_licence({"used": None}) == ""

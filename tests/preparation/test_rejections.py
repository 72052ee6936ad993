"""A job that rejects too many stories is refused, and says why."""

import pytest

from slm_ray.errors import UserError
from slm_ray.preparation.rejections import ADVICE, MIN_REJECTED, NOT_REJECTED, REASONS, refuse_too_many


def test_the_share_the_most_frequent_reason_and_a_way_out_are_said():
    expected = (
        r"70 of 1,000 stories \(7.0%\) were rejected, more than 5.0%; "
        r"most frequent reason: too_short \(40\): cut prose in text files with --cut-text pieces, or lower --min-"
        r"chars, or raise --max-rejected"
    )
    with pytest.raises(UserError, match=expected):
        refuse_too_many({"empty": 30, "too_short": 40, "duplicate": 500}, 1000, 0.05)


def test_the_limit_itself_is_allowed():
    refuse_too_many({"empty": 29}, 100, 0.29)
    with pytest.raises(UserError):
        refuse_too_many({"empty": 30}, 100, 0.29)


def test_duplicates_are_not_rejected():
    duplicates = {"duplicate": 600, "near_duplicate": 300}
    assert refuse_too_many(duplicates, 1000, 0.0) is None
    with pytest.raises(UserError, match=r"^1 of 1,000 .*empty \(1\)"):  # and they do not count beside others
        refuse_too_many(duplicates | {"empty": 1}, 1000, 0.0)


def test_a_handful_is_not_too_many_unless_it_is_more_than_half():
    refuse_too_many({"bad_json": MIN_REJECTED}, 2 * MIN_REJECTED, 0.01)
    for n_rejected, n_read in ((MIN_REJECTED + 1, 30), (MIN_REJECTED, 2 * MIN_REJECTED - 1), (1, 1)):
        with pytest.raises(UserError, match=rf"bad_json \({n_rejected}\)"):
            refuse_too_many({"bad_json": n_rejected}, n_read, 0.05)


def test_a_limit_of_nothing_is_meant():
    with pytest.raises(UserError, match=r"bad_json \(1\)"):
        refuse_too_many({"bad_json": 1}, 1000, 0.0)


def test_nothing_read_is_not_too_many():
    for limit in (0.0, 0.05, 1.0):
        assert refuse_too_many({}, 0, limit) is None


def test_every_reason_has_its_remedy():
    assert ADVICE.keys() | set(NOT_REJECTED) == set(REASONS)


def test_long_articles_may_be_cut_instead():
    with pytest.raises(
        UserError,
        match=r"too_long \(30\): cut text files with --cut-text lines \(a story a line\) or --cut-text pieces",
    ):
        refuse_too_many({"too_long": 30}, 100, 0.05)

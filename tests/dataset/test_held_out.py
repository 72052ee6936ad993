"""Stories that one data set of a mixture holds out and another trains on."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset import held_out
from slm_ray.dataset.held_out import marks, refuse_trained_on
from slm_ray.dataset.manifest import data_sets, load_manifest
from slm_ray.errors import UserError
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.training.inputs import check_files
from tests.support.data_sets import write_data

stories_of_tokens = st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=12)


@given(stories_of_tokens)
def test_stories_have_one_mark_where_their_tokens_are_the_same(stories: list[list[int]]) -> None:
    tokens = np.array([token for story in stories for token in story], np.uint16)
    found = marks(tokens, np.array([len(story) for story in stories], np.int64)).tolist()
    for first, its_mark in zip(stories, found, strict=True):
        assert [first == second for second in stories] == [its_mark == mark for mark in found]


def mixture(tmp_path: Path, tokenizer: Tokenizer, second: dict[str, list[tuple[int, int]]]) -> str:
    write_data(tmp_path / "a", tokenizer, {"train": [(0, 20), (20, 30)], "validation": [(30, 33)], "test": [(33, 36)]})
    write_data(tmp_path / "b", tokenizer, second)
    return f"{tmp_path / 'a'}=0.7 {tmp_path / 'b'}=0.3"


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            {"train": [(40, 50), (32, 33)], "validation": [(60, 62)]},
            "b trains on at least 1 stories that .*a holds out",
        ),
        ({"train": [(34, 50)], "validation": [(60, 62)]}, "b trains on at least 2 stories that .*a holds out"),
        ({"train": [(40, 60)], "test": [(25, 26)]}, "a trains on at least 1 stories that .*b holds out"),
    ],
    ids=["validation", "test", "of the first"],
)
def test_a_mixture_that_trains_on_what_it_holds_out_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer, second: dict[str, list[tuple[int, int]]], said: str
) -> None:
    data = mixture(tmp_path, tiny_tokenizer, second)
    with pytest.raises(UserError, match=said):
        check_files(TrainConfig(data=data), load_manifest(data))


def test_data_sets_that_share_training_or_held_out_stories_go_together(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    data = mixture(tmp_path, tiny_tokenizer, {"train": [(10, 30), (40, 50)], "validation": [(31, 35)]})
    refuse_trained_on(data_sets(data, load_manifest(data)))


def test_what_went_together_is_not_read_again_in_the_same_process(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mixture(tmp_path, tiny_tokenizer, {"train": [(10, 30), (40, 51)], "validation": [(31, 35)]})
    parts = data_sets(data, load_manifest(data))
    refuse_trained_on(parts)
    monkeypatch.setattr(held_out, "split_parts", lambda *_: pytest.fail("it is read again"))
    refuse_trained_on(parts)
    write_data(tmp_path / "c", tiny_tokenizer, {"train": [(60, 80)]})
    other = f"{tmp_path / 'a'}=0.7 {tmp_path / 'c'}=0.3"
    with pytest.raises(pytest.fail.Exception, match="it is read again"):
        refuse_trained_on(data_sets(other, load_manifest(other)))

"""The chain of origins in `state.json`: every link comes back, cut where it is long, and files of before open."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from slm_ray.config.resuming import with_earlier_defaults
from slm_ray.runs import checkpoint
from slm_ray.runs.train_state import MAX_ORIGINS, Origin, TrainState

V1 = Path(__file__).with_name("checkpoint_v1")
OURS = Origin(reference="a", weights_sha256="a1", lineage=[("f", 0)], is_start_known=True)
OTHERS = Origin(reference="hub:a/b@c", weights_sha256="b2")


def begun(origin: Origin | None) -> TrainState:
    return dataclasses.replace(checkpoint.load_state(V1 / "run"), origin=origin)


def record(state: TrainState) -> dict[str, Any]:
    """As a file gives it."""
    return dict(json.loads(json.dumps(state.to_record())))


def chain(links: int) -> Origin:
    """Of so many, the farthest made by others."""
    found = OTHERS
    for number in range(1, links):
        found = dataclasses.replace(OURS, reference=f"link-{links - number}", origin=found)
    return found


def test_a_chain_comes_back_as_it_was_written() -> None:
    state = begun(chain(3))
    again = TrainState.from_record(record(state))
    assert again == state
    assert again.origin is not None and again.origin.origin is not None
    assert [link.reference for link in again.origin.chain] == ["link-1", "link-2", "hub:a/b@c"]
    assert [link.is_of_others for link in again.origin.chain] == [False, False, True]


@pytest.mark.parametrize("origin", [None, dataclasses.replace(OURS, is_start_known=False), OTHERS])
def test_a_state_of_an_earlier_version_has_an_origin_of_which_no_more_is_known(origin: Origin | None) -> None:
    before = record(begun(origin))
    if origin is not None:
        del before["origin"]["origin"], before["origin"]["is_start_known"]
    state = TrainState.from_record(before)
    assert state.origin == origin
    assert origin is None or not origin.is_ours


def test_only_a_chain_that_is_known_to_its_end_and_ours_is_ours() -> None:
    assert OURS.is_ours and dataclasses.replace(OURS, origin=OURS).is_ours
    unknown = dataclasses.replace(OURS, is_start_known=False)
    for link in (OTHERS, unknown, chain(4), dataclasses.replace(OURS, origin=unknown)):
        assert not link.is_ours
    assert not dataclasses.replace(OTHERS, is_start_known=True).is_ours


def test_a_long_chain_is_cut_at_its_far_end_and_no_more_ours() -> None:
    ours = OURS
    for _ in range(MAX_ORIGINS):
        ours = dataclasses.replace(OURS, origin=ours)
    cut = ours.shortened()
    assert ours.is_ours and len(ours.chain) == MAX_ORIGINS + 1
    assert len(cut.chain) == MAX_ORIGINS and not cut.is_ours
    assert cut.shortened() == cut and chain(3).shortened() == chain(3)
    assert TrainState.from_record(record(begun(cut))).origin == cut


@pytest.mark.parametrize("links", [MAX_ORIGINS + 1, 300])
def test_a_file_with_a_longer_chain_is_none_of_ours(links: int) -> None:
    before = record(begun(OTHERS))
    for _ in range(links - 1):
        before["origin"] = before["origin"] | {"origin": before["origin"]}
    with pytest.raises(ValueError, match=f"a chain of {links} models, and {MAX_ORIGINS} are read"):
        TrainState.from_record(before)
    before["origin"] = {"reference": "a", "weights_sha256": "b", "origin": 3}
    with pytest.raises(ValueError, match=r"origin\.origin: "):
        TrainState.from_record(before)


def test_teachers_come_back_and_count_for_whose_a_model_is() -> None:
    taught = dataclasses.replace(OURS, teachers=[OURS, dataclasses.replace(OURS, teachers=[OTHERS])])
    state = dataclasses.replace(begun(None), config=with_earlier_defaults({"teacher": ["a"]}), teachers=[taught])
    assert TrainState.from_record(record(state)) == state
    assert [one.reference for one in taught.every] == ["a", "a", "a", "hub:a/b@c"]
    assert not taught.is_ours and not state.is_ours
    assert dataclasses.replace(state, teachers=[OURS]).is_ours
    assert not dataclasses.replace(state, teachers=[]).is_ours  # nothing says which weights they had


def test_a_tree_of_teachers_is_cut_to_what_is_read() -> None:
    tree = OURS
    for _ in range(6):
        tree = dataclasses.replace(OURS, teachers=[tree, tree], origin=tree)
    cut = tree.shortened()
    assert tree.is_ours and not cut.is_ours and 1 < len(cut.every) <= MAX_ORIGINS
    with pytest.raises(ValueError, match=f"{MAX_ORIGINS} are read"):
        TrainState.from_record(record(dataclasses.replace(begun(None), teachers=[tree])))
    assert "teachers" not in json.dumps(record(begun(chain(3))))

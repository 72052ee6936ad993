"""Who is champion: aliases that move only from where they were seen, and back."""

import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from slm_ray.errors import UserError
from slm_ray.tracking import aliases, mlflow_runs, registry


def add_versions(uri: str, name: str, count: int, folder: Path) -> MlflowClient:
    store = mlflow_runs.client(uri)
    store.create_registered_model(name)
    for _ in range(count):
        store.create_model_version(name, source=folder.as_uri())
    return store


def test_a_model_that_nobody_registered_has_no_aliases(mlflow_uri: str) -> None:
    mlflow_runs.client(mlflow_uri)
    assert aliases.versions_by_alias(mlflow_uri, "nobody") == {}


def test_the_alias_moves_only_from_where_it_was_seen(mlflow_uri: str, tmp_path: Path) -> None:
    store = add_versions(mlflow_uri, "moves", 3, tmp_path)
    assert aliases.make_champion(mlflow_uri, "moves", "1", instead_of="", tags={"promotion": "promoted"}) == "1"
    assert aliases.make_champion(mlflow_uri, "moves", "2", instead_of="", tags={"promotion": "promoted"}) == "1"
    assert "promotion" not in store.get_model_version("moves", "2").tags
    assert aliases.make_champion(mlflow_uri, "moves", "2", instead_of="1", tags={"promotion": "promoted"}) == "2"
    tags = store.get_model_version("moves", "2").tags
    assert (tags[aliases.BEFORE], tags["promotion"]) == ("1", "promoted") and tags[aliases.SINCE]
    aliases.make_challenger(mlflow_uri, "moves", "3", {"promotion_reason": "worse"})
    assert aliases.versions_by_alias(mlflow_uri, "moves") == {"champion": "2", "challenger": "3"}
    assert store.get_model_version("moves", "3").tags == {"promotion_reason": "worse"}
    assert aliases.make_champion(mlflow_uri, "moves", "3", instead_of="2", tags={}) == "3"
    assert aliases.versions_by_alias(mlflow_uri, "moves") == {"champion": "3"}


def test_a_rollback_goes_back_step_by_step_and_ends(mlflow_uri: str, tmp_path: Path) -> None:
    store = add_versions(mlflow_uri, "back", 3, tmp_path)
    for number in (1, 2, 3):
        before = "" if number == 1 else str(number - 1)
        aliases.make_champion(mlflow_uri, "back", str(number), instead_of=before, tags={})
    assert aliases.roll_back(mlflow_uri, "back") == ("3", "2")
    assert store.get_model_version("back", "3").tags[aliases.ROLLED_BACK]
    assert aliases.roll_back(mlflow_uri, "back") == ("2", "1")
    with pytest.raises(UserError, match="nothing says which was before"):
        aliases.roll_back(mlflow_uri, "back")
    assert aliases.versions_by_alias(mlflow_uri, "back") == {"champion": "1"}


def test_a_rollback_without_a_place_to_go_is_one_line(mlflow_uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no champion"):
        aliases.roll_back(mlflow_uri, "nobody")
    store = add_versions(mlflow_uri, "lost", 2, tmp_path)
    aliases.make_champion(mlflow_uri, "lost", "1", instead_of="", tags={})
    aliases.make_champion(mlflow_uri, "lost", "2", instead_of="1", tags={})
    store.delete_model_version("lost", "1")
    with pytest.raises(UserError, match=r"version 1 of lost.*was deleted"):
        aliases.roll_back(mlflow_uri, "lost")
    assert aliases.versions_by_alias(mlflow_uri, "lost") == {"champion": "2"}


def test_of_promotions_at_once_one_moves_the_alias_and_no_tag_is_lost(mlflow_uri: str, tmp_path: Path) -> None:
    count = 6
    store = add_versions(mlflow_uri, "race", count + 1, tmp_path)
    aliases.make_champion(mlflow_uri, "race", "1", instead_of="", tags={})
    start, found = threading.Barrier(count), {}

    def promote(version: str) -> None:
        start.wait()
        found[version] = aliases.make_champion(mlflow_uri, "race", version, instead_of="1", tags={"promotion": version})

    threads = [threading.Thread(target=promote, args=(str(number),)) for number in range(2, count + 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    (winner,) = set(found.values())
    assert found[winner] == winner == aliases.versions_by_alias(mlflow_uri, "race")["champion"]
    tagged = [number for number in found if "promotion" in store.get_model_version("race", number).tags]
    assert tagged == [winner]


def test_on_a_server_the_promotion_that_was_overtaken_is_told(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server knows no lock: another client may move the alias between the look and the move."""
    store = add_versions(mlflow_uri, "served", 3, tmp_path)
    aliases.make_champion(mlflow_uri, "served", "1", instead_of="", tags={})
    monkeypatch.setattr(aliases, "sqlite_file", lambda _: None)
    monkeypatch.setattr("time.sleep", lambda _: store.set_registered_model_alias("served", "champion", "3"))
    assert aliases.make_champion(mlflow_uri, "served", "2", instead_of="1", tags={}) == "3"


def test_a_store_that_does_not_answer_is_not_taken_for_one_without_a_champion(
    mlflow_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_versions(mlflow_uri, "away", 2, tmp_path)
    aliases.make_champion(mlflow_uri, "away", "1", instead_of="", tags={})

    def fail(*_: object) -> None:
        raise MlflowException("the database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_registered_model", fail)
        for call in (
            lambda: aliases.versions_by_alias(mlflow_uri, "away"),
            lambda: aliases.make_champion(mlflow_uri, "away", "2", instead_of="", tags={}),
            lambda: aliases.roll_back(mlflow_uri, "away"),
        ):
            with pytest.raises(registry.RegistryError, match=r"not available from .*: the database is locked"):
                call()
    assert aliases.versions_by_alias(mlflow_uri, "away") == {"champion": "1"}


def test_a_store_that_is_not_there_is_said_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate.py --rollback` in a wrong folder: "there is no champion" would be untrue of the right one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it
    uri = mlflow_runs.resolve_uri("")
    for ask in (
        lambda: aliases.roll_back(uri, "stories"),
        lambda: aliases.versions_by_alias(uri, "stories"),
        lambda: aliases.make_champion(uri, "stories", "1", instead_of="", tags={}),
        lambda: aliases.make_challenger(uri, "stories", "1", {}),
    ):
        with pytest.raises(registry.RegistryError, match="no model registry at"):
            ask()
    with pytest.raises(UserError, match="tracking is off"):
        aliases.roll_back(mlflow_runs.OFF, "stories")
    assert not list(tmp_path.iterdir())

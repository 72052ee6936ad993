"""Which version of a registered model is the champion, which was before it, and who may change that.

In: a resolved store, a model's name, versions. Out: aliases that moved, and tags of the version that they moved to.
Comparing models is the caller's: here an alias moves only from where the caller saw it.
"""

import contextlib
import datetime
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from slm_ray.errors import UserError, one_line
from slm_ray.locks import folder_lock
from slm_ray.tracking.mlflow_runs import resolve_uri, sqlite_file
from slm_ray.tracking.registry import REGISTERED, RegistryError, open_store
from slm_ray.tracking.store_faults import store_errors

CHAMPION, CHALLENGER = "champion", "challenger"
BEFORE, SINCE = "champion_before", "champion_since"
"""Tags of a version that became champion: the version before it (empty for the first), and when."""
ROLLED_BACK = "rolled_back_at"
SETTLE_S = 2.0
"""A server knows no lock: for so long another promotion that saw the same champion may still move the alias."""
LOCK_WITHIN_S = 60.0


def registered_name(reference: str) -> str:
    """`tinystories` of `models:/tinystories@champion`. Raises: UserError when it names no registered model."""
    name = re.split("[@/]", reference.removeprefix(REGISTERED))[0]
    if not reference.startswith(REGISTERED) or not name:
        raise UserError(f"{reference} names no registered model: write models:/NAME@champion")
    return name


def versions_by_alias(uri: str, name: str) -> dict[str, str]:
    """Every alias of a registered model with its version; none of a model that nobody registered.

    Raises:
        RegistryError: the store does not answer.
    """
    with _store_errors(uri, name):
        return _aliases(open_store(name, uri), name)


def version_to_beat(uri: str, name: str, candidate: str) -> str:
    """Where a model has no champion, the version that a candidate is compared with: the last that was champion and is
    still there, else the challenger; empty where there is neither. One that was rolled back does not count.

    Raises:
        RegistryError: the store does not answer.
    """
    with _store_errors(uri, name):
        store = open_store(name, uri)
        quote = '"' if "'" in name else "'"
        versions = {str(one.version): one.tags for one in store.search_model_versions(f"name = {quote}{name}{quote}")}
        versions.pop(candidate, None)
        since = {number: tags.get(SINCE, "") for number, tags in versions.items()}
        since = {number: at for number, at in since.items() if at > versions[number].get(ROLLED_BACK, "")}
        challenger = _aliases(store, name).get(CHALLENGER, "")
        return max(since, key=since.__getitem__) if since else challenger if challenger in versions else ""


def aliases_of(name: str, version: str, tracking_uri: str = "") -> tuple[str, ...]:
    """The aliases of a version, sorted. Raises: RegistryError when the store does not say."""
    known = versions_by_alias(resolve_uri(tracking_uri), name)
    return tuple(sorted(alias for alias, number in known.items() if number == version))


def _aliases(store: Any, name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in store.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def make_champion(uri: str, name: str, version: str, *, instead_of: str, tags: Mapping[str, str]) -> str:
    """Move `champion` to a version if it is still where the caller saw it; returns the version that has it now.

    instead_of: the version that had it, empty where none had. The tags are the version's, written before the alias
    moves, so that a champion never lacks its `champion_before`. In a store on this machine nobody comes between; of
    two promotions on a server that saw the same champion, the one that was overtaken gets the other's version back.

    Raises:
        RegistryError: the store does not answer; the alias is where it was, or moved with its tags.
    """
    store = open_store(name, uri)
    with _alone(uri), _store_errors(uri, name):
        now = _aliases(store, name).get(CHAMPION, "")
        if now != instead_of:
            return now
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        for tag, value in {**tags, BEFORE: instead_of, SINCE: since}.items():
            store.set_model_version_tag(name, version, tag, value)
        store.set_registered_model_alias(name, CHAMPION, version)
        if _aliases(store, name).get(CHALLENGER) == version:
            store.delete_registered_model_alias(name, CHALLENGER)
        if sqlite_file(uri) is None:
            time.sleep(SETTLE_S)
        return _aliases(store, name).get(CHAMPION, "")


def make_challenger(uri: str, name: str, version: str, tags: Mapping[str, str]) -> None:
    """Give a version the alias `challenger`, with tags that say why it is not champion. Raises: RegistryError."""
    with _store_errors(uri, name):
        store = open_store(name, uri)
        for tag, value in tags.items():
            store.set_model_version_tag(name, version, tag, value)
        store.set_registered_model_alias(name, CHALLENGER, version)


def roll_back(uri: str, name: str) -> tuple[str, str]:
    """Give `champion` back to the version that had it before; returns the version that lost it, and that one.

    Raises:
        RegistryError: the store does not answer.
        UserError: nobody is champion, nobody was before, or that version was deleted.
    """
    store = open_store(name, uri)
    with _alone(uri), _store_errors(uri, name):
        version = _aliases(store, name).get(CHAMPION, "")
        if not version:
            raise UserError(f"{name} has no champion at {uri}: there is nothing to roll back")
        before = store.get_model_version(name, version).tags.get(BEFORE, "")
        if not before:
            raise UserError(f"version {version} of {name} is champion and nothing says which was before it")
        _check_version(store, name, version, before)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        store.set_model_version_tag(name, version, ROLLED_BACK, now)
        store.set_registered_model_alias(name, CHAMPION, before)
        return version, before


def _check_version(store: Any, name: str, version: str, before: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.get_model_version(name, before)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(
            f"version {before} of {name}, which was champion before {version}, was deleted: "
            f"name another with --model models:/{name}/NUMBER --promote"
        ) from error


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Keep other promotions out of a store on this machine; waits for one that goes on."""
    database = sqlite_file(uri)
    if database is None:
        yield
        return
    refusal = f"another promotion is writing to {database}: try again when it has ended"
    lock = database.with_name(f".{database.name}.promotion")
    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + LOCK_WITHIN_S
        while True:
            try:
                stack.enter_context(folder_lock.locked(lock, refusal))
                break
            except UserError as error:
                if not str(error).startswith(refusal) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)
        yield


@contextlib.contextmanager
def _store_errors(uri: str, name: str) -> Iterator[None]:
    try:
        yield
    except store_errors() as error:
        raise RegistryError(f"{name} is not available from {uri}: {one_line(error)}") from error

"""The places and names in a config, as others may see them.

In: the fields of a config. Out: the same without passwords, for what is saved; without any place of its maker, for what
is registered or given away; as the user typed them, for the record of the run.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from slm_ray import storage
from slm_ray.config.mixtures import each_place, named_data
from slm_ray.errors import without_secrets

ADDRESSES = ("data", "output", "tracking_uri", "init_from")
"""Fields of `TrainConfig` that name a place."""
LISTS = ("teacher",)
"""Fields that name several."""
MAX_MODEL_NAME_BYTES = 200


def saved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with no user, password or query in an address."""
    places = {name: without_secrets(str(config[name])) for name in ADDRESSES if name in config}
    if "data" in config:
        places["data"] = _public_data(str(config["data"]))
    lists = {name: [without_secrets(str(one)) for one in config[name]] for name in LISTS if name in config}
    return {**config, **places, **lists}


def _public_data(data: str) -> str:
    """Each address for itself: the weight behind a query is none of it."""
    return without_secrets(data) if data == (found := each_place(data, without_secrets)) else found


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that mean something elsewhere: of places the last names of data set and teachers alone."""
    kept = {name: value for name, value in config.items() if name not in (*ADDRESSES, *LISTS)}
    kept |= {name: [origin_name(str(one)) for one in config[name]] for name in LISTS if config.get(name)}
    data = named_data(_public_data(str(config.get("data", ""))))
    return kept | ({"data": data} if data else {})


def typed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with places below the working folder as seen from there."""
    saved = saved_config(config)
    places = {
        name: each_place(saved[name], _from_here) if name == "data" else _from_here(saved[name])
        for name in ("data", "output", "init_from")
        if name in saved
    }
    return saved | places | {name: [_from_here(one) for one in saved[name]] for name in LISTS if name in saved}


def _from_here(place: str) -> str:
    here = Path.cwd()
    if storage.is_remote(place) or not Path(place).is_relative_to(here):
        return place
    return Path(place).relative_to(here).as_posix()


def origin_name(reference: str) -> str:
    """What `init_from` names, as others may see it: of a folder the last name alone."""
    if reference.startswith(("models:/", "hub:")):
        return reference
    return PurePosixPath(without_secrets(reference)).name


def place_of(reference: str) -> str:
    """A reference as every process of this machine takes it: a folder by its absolute path."""
    path = Path(reference)
    try:
        return str(path.absolute()) if reference and path.is_dir() else reference
    except (OSError, ValueError):  # said where it is opened
        return reference


def absolute_data(data: str) -> str:
    """A field `data` as every process takes it: each of its folders by its absolute path."""
    return each_place(data, lambda place: str(storage.storage_path(place)))


def moved_data(data: str, output: str, output_now: Path) -> str:
    """Where a run's data set is: where it was, or as far from the runs as it was, where both have moved; so each of a
    mixture."""
    return each_place(data, lambda place: moved_place(place, output, output_now))


def moved_place(place: str, output: str, output_now: Path) -> str:
    """Where a folder of a run is now, as `moved_data`; what is no absolute path is left as it is."""
    is_elsewhere = storage.is_remote(place) or storage.is_remote(output)
    if is_elsewhere or not (Path(place).is_absolute() and Path(output).is_absolute()) or Path(place).exists():
        return place
    moved = Path(os.path.normpath(output_now / os.path.relpath(place, output)))
    return str(moved) if moved.exists() else place


def model_name_fault(name: str) -> str:
    """Why nothing can be registered under a name; empty where it can, or where there is none.

    `models:/NAME@ALIAS` and `models:/NAME/VERSION` must lead back to it, and MLflow takes it for a part of a path.
    """
    if set(name) & set(":/@\\"):
        return "must be a name without a colon or slash (or @)"
    if name.strip() != name or name in (".", "..") or not name.isprintable():
        return "must be a name that neither begins nor ends with a space, and can be printed"
    if len(name.encode(errors="replace")) > MAX_MODEL_NAME_BYTES:
        return f"must be a name of at most {MAX_MODEL_NAME_BYTES} bytes"
    return ""

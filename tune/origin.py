"""Where a sweep's first weights and its teachers lie, from its first trial to its last `--resume`.

In: the places that `init_from` and `teacher` led to, the sha256 of the weights there. Out: places with these weights
now. A checkpoint of a run that goes on is held in the sweep's folder, since that run removes it one day; a folder that
was moved is looked for as far from the sweeps as it was, and `init_from` as far from the working folder too.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from slm_ray import storage
from slm_ray.config.places import moved_data
from slm_ray.errors import UserError
from slm_ray.runs.run_folder import CHECKPOINT_NAME
from slm_ray.storage import StoragePath
from slm_ray.training.starting_point import pinned_origin
from tune.config import SweepConfig

HELD, TEACHERS_HELD = "origin", "teachers"
"""Folders in a sweep's own that hold the checkpoint which its trials begin with, and those which they learn from."""
_PARTIAL = ".partial"


def held_origin(folder: StoragePath) -> str:
    """The checkpoint to begin with that a sweep's folder holds; empty where there is none."""
    return _held(folder, HELD)


def held_teachers(folder: StoragePath, teachers: Sequence[str]) -> tuple[str, ...]:
    """The places of a sweep's teachers: in its folder, where it holds them."""
    return tuple(_held(folder, f"{TEACHERS_HELD}/{number}") or place for number, place in enumerate(teachers, 1))


def _held(folder: StoragePath, name: str) -> str:
    held = Path(str(folder)) / name
    if not storage.is_local(folder) or not held.is_dir():
        return ""
    return next((str(path) for path in sorted(held.iterdir()) if CHECKPOINT_NAME.fullmatch(path.name)), "")


def hold_origin(folder: StoragePath, init_from: str) -> None:
    """Hold a checkpoint that its run may remove, by links to its files where the disk has them, else by copies.

    A sweep in an object store holds none: its workers could not open it by a path.

    Raises:
        UserError: it was removed since it was found, or the sweep's folder cannot be written to.
    """
    _hold(folder, HELD, init_from)


def hold_teachers(folder: StoragePath, teachers: Sequence[str]) -> None:
    """The same of what the trials learn from. Raises: UserError."""
    for number, place in enumerate(teachers, 1):
        _hold(folder, f"{TEACHERS_HELD}/{number}", place)


def _hold(folder: StoragePath, name: str, checkpoint: str) -> None:
    place = Path(checkpoint)
    is_kept_by_a_run = place.parent.name == "checkpoints" and CHECKPOINT_NAME.fullmatch(place.name) is not None
    if not (is_kept_by_a_run and storage.is_local(folder)) or _held(folder, name):
        return
    held = Path(str(folder)) / name / place.name
    partial = held.with_name(f"{held.name}{_PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        held.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(place, partial, copy_function=_link)
        partial.rename(held)
    except OSError as error:  # of copytree, with a list in place of a reason
        if not place.exists():
            raise UserError(
                f"{place} is gone, its run keeps newer checkpoints alone: begin a sweep with another --name from one "
                "that stays"
            ) from error
        raise UserError(f"cannot hold {place} in {held.parent}: {error.strerror or error}") from error


def _link(source: str, target: str) -> None:
    with contextlib.suppress(OSError):  # another disk, or one without links
        os.link(os.path.realpath(source), target)
        return
    shutil.copy2(source, target)


def origin_now(saved: SweepConfig, weights_sha256: str, from_here: str, folder: StoragePath) -> str:
    """Where the first weights of a sweep that goes on are; where they were, if they are not found by their sha256.

    `from_here` is their place as seen from the working folder of the last start.
    """
    if not saved.init_from or not weights_sha256 or not storage.is_local(folder) or not _is_place(saved.init_from):
        return saved.init_from
    moved = moved_data(saved.init_from, saved.output, Path(str(folder)).parent)
    for place in (held_origin(folder), saved.init_from, moved, from_here):
        if place and _sha256_at(place, saved) == weights_sha256:
            return place
    return saved.init_from


def _is_place(reference: str) -> bool:
    return not reference.startswith(("models:/", "hub:"))


def _sha256_at(place: str, saved: SweepConfig) -> str:
    """Of the weights at a place; empty where none can be read, which is said when they are opened."""
    try:
        return pinned_origin(dataclasses.replace(saved, init_from=place))[1]
    except UserError:
        return ""

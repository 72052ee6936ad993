"""What a sweep was begun with, `sweep.json` in its folder, and how it goes on.

In: a `SweepConfig`. Out: the record, read back; the config to go on with, in which what is not given is as it was.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slm_ray import storage
from slm_ray.config.files import flatten, from_dict
from slm_ray.config.mixtures import named_data
from slm_ray.config.places import moved_data, moved_place, saved_config, typed_config
from slm_ray.config.resuming import as_saved, differences, is_one_of, nested, overlaid, with_earlier_defaults
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError, reason, without_secrets
from slm_ray.storage import StoragePath
from tune.config import SweepConfig, space_of
from tune.origin import held_teachers, origin_now
from tune.space import Point, Space, make_space

RECORD = "sweep.json"
KEPT = (
    "seed", "batch_size", "epochs", "max_steps", "trial_steps", "precision", "packing", "attention", "validation",
    "model", "optim", "teacher_weight", "teacher_temperature", "mtp_weights", "mtp_until",
)  # fmt: skip
"""What makes two trials comparable; the data set does too, by its fingerprint, and the weights that they begin with and
learn from, by their sha256. The rest may change on `--resume`: the
grid, the workers, what is registered."""
KEPT_BY_ASHA = ("reduction_factor", "eval_interval_steps")
"""Of a sweep with early stopping too: where the rungs are."""


DATA = "data_fingerprint"
ORIGIN, ORIGIN_SHA256 = "init_from", "origin_sha256"
TEACHERS, TEACHER_SHA256 = "teacher", "teacher_sha256"
FROM_HERE = "init_from_here"
"""Where the weights lay as seen from the working folder, which may move with them."""


def shared_options(
    sweep: SweepConfig, space: Space, origin_sha256: str, teacher_sha256: Sequence[str] = ()
) -> dict[str, Any]:
    """What every trial of a sweep has in common, its data set and the weights that it begins with included; and how it
    searches. `origin_sha256` is of these weights, empty of random ones; `teacher_sha256` of those of its teachers.

    Of a random or Optuna search the whole space, since its points follow from it. A grid may grow.
    """
    fields = as_saved({name: saved_config(dataclasses.asdict(sweep))[name] for name in KEPT})
    shared = {name: value for name, value in fields.items() if name not in space}
    shared |= {DATA: load_manifest(sweep.data).fingerprint, "varied": sorted(space)}
    shared |= {ORIGIN: without_secrets(sweep.init_from), ORIGIN_SHA256: origin_sha256}
    if sweep.teacher:
        shared |= {TEACHERS: [without_secrets(one) for one in sweep.teacher], TEACHER_SHA256: list(teacher_sha256)}
    shared |= {"search": sweep.search, "scheduler": sweep.scheduler}
    if sweep.scheduler == "asha":
        shared |= {name: getattr(sweep, name) for name in KEPT_BY_ASHA}
    if sweep.search != "grid":
        shared["space"] = json.dumps(plain_space(space))  # in order, which decides what is drawn
    return shared


def plain_space(space: Space) -> dict[str, Any]:
    """As a space file says it."""
    return {field: domain.plain for field, domain in space.items()}


def space_to_sweep(sweep: SweepConfig, record: Mapping[str, Any] | None) -> Space:
    """The space of a sweep's options; where its file is gone, that of the record.

    Raises:
        UserError: there is none, or it is refused.
    """
    is_gone = bool(sweep.space) and not Path(sweep.space).exists()
    if is_gone and record and "space" in record and record["config"].get("space") == sweep.space:
        return make_space(record["space"], RECORD)
    return space_of(sweep)


def write_record(
    folder: StoragePath,
    sweep: SweepConfig,
    run_id: str,
    space: Space,
    origin_sha256: str,
    batches: Sequence[Sequence[Point]] = (),
    teacher_sha256: Sequence[str] = (),
) -> None:
    """Leave the record in a sweep's folder: `batches` are the points that were suggested so far; both sha256 as of
    `shared_options`.

    Raises:
        UserError: it cannot be written.
    """
    config = saved_config(dataclasses.asdict(sweep))
    content: dict[str, Any] = {
        "run_id": run_id,
        "shared": shared_options(sweep, space, origin_sha256, teacher_sha256),
        "space": plain_space(space),
        "config": config,
        FROM_HERE: typed_config(config)[ORIGIN],
    }
    content["batches"] = [[dict(point) for point in batch] for batch in batches]
    try:
        storage.replace_file(folder / RECORD, (json.dumps(content, indent=2) + "\n").encode())
    except Exception as error:  # each store has errors of its own
        raise UserError(f"cannot write to {folder}: {reason(error)}") from error


def read_record(folder: StoragePath) -> dict[str, Any] | None:
    """What `write_record` left, or None where there is no sweep.

    Raises:
        UserError: there is a record and it cannot be read, now or ever.
    """
    path = folder / RECORD
    try:
        content = storage.read(path)
    except FileNotFoundError:
        return None
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    try:
        record = json.loads(content.decode("utf-8"))
        if not isinstance(record["shared"], dict) or not isinstance(record["run_id"], str):
            raise TypeError("it has other fields")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error}): bring it back, or take another --name") from error
    return dict(record)


def refuse_other_options(folder: StoragePath, record: Mapping[str, Any], shared: Mapping[str, Any], data: str) -> None:
    """Raises: UserError, with each option that makes the trials another sweep's. `data` is the data set of now."""
    was = with_earlier_defaults(record["shared"])
    by_weights = (ORIGIN, ORIGIN_SHA256, TEACHERS, TEACHER_SHA256)
    changed = differences(was, shared, [name for name in shared if name not in by_weights])
    if DATA in changed:
        before = record.get("config", {}).get("data", "")  # earlier versions did not keep it
        texts = [f"{named_data(place)} ({mark[DATA][:12]})".lstrip() for place, mark in ((before, was), (data, shared))]
        changed[DATA] = f"data was {texts[0]} and is now {texts[1]}"
    if other := _other_origin(record["shared"], shared):
        changed[ORIGIN] = other
    if other := _other_teachers(was, shared):
        changed[TEACHERS] = other
    if changed:
        said = ", ".join(changed.values())
        way = "begin another, without --resume and with another --name"
        if not _is_unknown_origin(record["shared"]):  # left out, it is the same as before, and as unknown
            way = "leave it out, or take another --name"
        raise UserError(f"{folder}: {said}: a sweep keeps what its trials share; {way}")


def _is_unknown_origin(was: Mapping[str, Any]) -> bool:
    """Whether an earlier version began it with weights that nobody can tell any more."""
    return bool(was.get(ORIGIN, "")) and not was.get(ORIGIN_SHA256, "")


def _other_origin(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the trials would begin with other weights than those before; empty where they begin with the same, wherever
    these lie."""
    before, its_weights = was.get(ORIGIN, ""), was.get(ORIGIN_SHA256, "")
    if its_weights == now[ORIGIN_SHA256] and (its_weights or not before):
        return ""
    if _is_unknown_origin(was):
        return f"{ORIGIN} was {before}, and an earlier version did not record which weights that led to"
    other = ", which has other weights" if before and now[ORIGIN] else ""
    return f"{ORIGIN} was {before or 'not given'} and is now {now[ORIGIN] or 'not given'}{other}"


def _other_teachers(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the trials would learn from other models than those before; empty where from the same, wherever these lie."""
    if was.get(TEACHER_SHA256, []) == now.get(TEACHER_SHA256, []):
        return ""
    before, given = was.get(TEACHERS, []), now.get(TEACHERS, [])
    other = ", which has other weights" if before and given else ""
    return f"{TEACHERS} was {' '.join(before) or 'not given'} and is now {' '.join(given) or 'not given'}{other}"


def config_to_resume(base: SweepConfig, origin: str, output: str, name: str) -> SweepConfig:
    """That of the sweep of this name, or of the newest, with what `--config` gives over it; without one, `base`.

    Raises:
        UserError: it cannot be known whether there is one, or what it was.
    """
    where = storage.storage_path(output)
    base = dataclasses.replace(base, resume=True)
    if not name and not storage.is_local(where):
        raise UserError(f"--resume needs the --name of a sweep in {output}")
    folder = where / name if name else newest_sweep(where)
    record = read_record(folder) if folder else None
    if not folder or not record:
        return dataclasses.replace(base, name=folder.name) if folder else base
    if "config" not in record:  # earlier versions did not keep it
        was = base if origin else _as_begun(base, record, str(folder / RECORD))
        return dataclasses.replace(was, name=folder.name)
    saved = from_dict(SweepConfig, with_earlier_defaults(record["config"]), str(folder / RECORD))
    now = origin_now(saved, record["shared"].get(ORIGIN_SHA256, ""), record.get(FROM_HERE, ""), folder)
    was = dataclasses.replace(_moved(saved, folder), force=False, init_from=now)
    if origin:
        was = overlaid(was, origin, KEPT)
    register = was.register or base.register  # a file's empty name means the default, as at the first start
    return dataclasses.replace(was, resume=True, output=output, name=folder.name, register=register)


def _as_begun(base: SweepConfig, record: Mapping[str, Any], where: str) -> SweepConfig:
    """What the record of an earlier version says of its trials, whatever their preset has become since: the grid, and
    what they have in common. A field of the model or the optimizer that it could not say has its own default."""
    shared = flatten(with_earlier_defaults(record["shared"]))
    was = {name: value for name, value in shared.items() if is_one_of(name, KEPT)}
    other = {name: value for name, value in flatten(dataclasses.asdict(base)).items() if not is_one_of(name, KEPT)}
    return from_dict(SweepConfig, nested(other | was) | dict(record.get("grid", {})), where)


def _moved(saved: SweepConfig, folder: StoragePath) -> SweepConfig:
    """With data set and teachers where they are now."""
    if not storage.is_local(folder):
        return saved
    teacher = held_teachers(folder, [moved_place(one, saved.output, folder.parent) for one in saved.teacher])
    return dataclasses.replace(saved, data=moved_data(saved.data, saved.output, folder.parent), teacher=teacher)


def newest_sweep(output: StoragePath) -> StoragePath | None:
    """The sweep under `output` that was begun last, if there is one. Raises: UserError when that cannot be known."""
    try:
        begun = {path: path.stat().st_mtime for path in (one / RECORD for one in output.iterdir()) if path.exists()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{output} cannot be listed: {reason(error)}") from error
    return max(begun, key=begun.__getitem__).parent if begun else None

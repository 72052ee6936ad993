"""Which files of a folder belong to a model, and that none of them leads out of it.

In: a folder that a stranger may have made. Out: its weights' files, one or the shards of an index; the path of one file
by its name. A pickle is never read; a link may lead anywhere within the folder and, in the hub's own cache, to its
blobs.
"""

import errno
import hashlib
import logging
import os
import stat
from pathlib import Path

from slm_ray import storage
from slm_ray.errors import UserError, one_line, visible
from slm_ray.model_files.json_files import read_json

LOGGER = logging.getLogger(__name__)
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
"""File types that run their writer's code when they are read."""
MAX_SHARDS = 1000


def pickle_refusal(path: Path) -> str:
    """Why a pickle is not read, and what is in its place."""
    return f"{path} is a pickle, which can run any code when it is read: give a checkpoint with {WEIGHTS}"


def model_file(folder: Path, name: str) -> Path | None:
    """The path of a file by its name in a folder; None where there is none.

    Raises:
        UserError: it is no file, or a link that leads out of the folder.
        OSError: it cannot be looked at.
    """
    path = folder / name
    try:
        status = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP or (isinstance(error, FileNotFoundError) and path.is_symlink()):
            raise UserError(f"{path} is a link that leads nowhere") from None
        if isinstance(error, FileNotFoundError):
            return None
        raise
    if not path.resolve().is_relative_to(_borders(folder.resolve())):
        raise UserError(f"{path} is a link that leads out of its folder: put the file itself there")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no file")
    return path


def _borders(folder: Path) -> Path:
    """What a link of a folder may lead to: the folder, or of a snapshot in the hub's cache what is kept of its model.

    There `models--OWNER--NAME/snapshots/COMMIT/FILE` is a link to `models--OWNER--NAME/blobs/DIGEST`.
    """
    snapshots = folder.parent
    is_cached = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent if is_cached else folder


def needed_file(folder: Path, name: str, advice: str = "") -> Path:
    """As `model_file`, of a file without which there is no model. Raises: UserError when it is missing, too."""
    path = model_file(folder, name)
    if path is None:
        raise UserError(f"{folder} has no {name}{advice and f': {advice}'}")
    return path


def has_model_files(folder: Path) -> bool:
    """Whether anything of a model in Hugging Face's layout lies there, if only a broken link. Raises: OSError."""
    return any(os.path.lexists(folder / name) for name in (CONFIG, WEIGHTS, INDEX))


def files_identity(folder: Path) -> str:
    """Digest of names, sizes and times of a folder's files: whatever is written there changes it. Raises: OSError."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    known = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in files]
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: `model.safetensors`, or the shards that its index names.

    Raises:
        UserError: there are none, there are only pickles, or the index names what is no file of the folder.
        OSError, ValueError: the index cannot be read.
    """
    whole, index = model_file(folder, WEIGHTS), model_file(folder, INDEX)
    if whole is None and index is None:
        for path in _pickles(folder):
            raise UserError(pickle_refusal(path))
        raise UserError(f"{folder} has no {WEIGHTS}")
    if whole is not None:
        return [whole]
    return [needed_file(folder, name, f"{INDEX} names it") for name in shard_names(folder / INDEX)]


def weights_sha256(folder: Path) -> str:
    """Digest of a model's weights: of their one file, or of the names and digests of all shards.

    Raises:
        UserError: as `weight_files`, or they cannot be read.
    """
    try:
        files = weight_files(folder)
        digests = {path.name: storage.file_sha256(path) for path in files}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model: {one_line(error)}") from error
    if len(digests) == 1:
        return next(iter(digests.values()))
    return storage.json_sha256(digests)


def say_pickles(folder: Path) -> None:
    """Warn of pickles beside a model's weights: they are not read."""
    pickles = _pickles(folder)
    if pickles:
        LOGGER.warning("%s is a pickle, and is not read", visible(", ".join(path.name for path in pickles)))


def _pickles(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, each a file of its own folder by its bare name.

    Raises:
        UserError: it names none, too many, or something else.
        OSError, ValueError: it cannot be read.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index} does not list tensors with their files")
    names = sorted(set(where.values()))
    if len(names) > MAX_SHARDS:
        raise UserError(f"{index} names {len(names)} files, and {MAX_SHARDS} are the most")
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or name in (".", ".."):
            raise UserError(f"{index} names {name!r}, which leads out of the folder")
        if Path(name).suffix != ".safetensors":
            raise UserError(f"{index} names {name!r}, and only .safetensors files are read")
    return names

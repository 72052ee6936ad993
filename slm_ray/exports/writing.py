"""One export from beginning to end: open the model, write, check, and only then let the folder appear.

In: a reference to a model, a target, a number format. Out: a folder that is complete or absent, with `parity.json` and
the model's card in it, perhaps on the hub too. `slm_ray/export.py` calls it.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError, one_line, reason
from slm_ray.exports import source_model
from slm_ray.exports.formats import FORMATS, Dtype, Format, Target
from slm_ray.exports.hf_folder import check_hf, write_hf, write_json
from slm_ray.exports.model_card import made_with, write_card
from slm_ray.exports.parity import PARITY, Expected, Parity, ParityError, expected, require
from slm_ray.exports.push import check_push, push
from slm_ray.exports.source_model import SourceModel
from slm_ray.model.threads import torch_threads
from slm_ray.runs import checkpoint

Write = Callable[[Path, SourceModel, Dtype], None]
Check = Callable[[Path, SourceModel, Expected, Dtype], list[Parity]]
Writer = tuple[Write, Check]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    shape: ModelConfig
    checks: tuple[Parity, ...]
    """None of a checkpoint, which is copied with its digests."""
    note: str = ""
    """What the user may want to give another time."""
    address: str = ""
    """Of the commit on the hub, where it was pushed."""


def export_model(
    reference: str,
    output: Path,
    to: Target,
    dtype: Dtype = "f32",
    *,
    data: str = "",
    push_to: str = "",
    tracking_uri: str = "",
) -> Export:
    """Write a model; the folder appears complete and checked, or not at all.

    Raises:
        ParityError: what was written does not compute what the model computes.
        UserError: no such model, a corrupt one, one that the target does not know, an output that is there already or
            cannot be written, a hub that does not take it.
    """
    writers = {name: _writer(name) for name in (FORMATS if to == "all" else (to,)) if name != "checkpoint"}
    output = output.absolute()
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already: name another --output")
    if push_to:
        check_push(push_to)
    with source_model.opened(reference, data, tracking_uri) as given:
        # The figures do not depend on the machine's cores, and on small tensors several threads wait for one another.
        with _appearing(output) as folder, torch_threads(1):
            checks = _write(folder, given, to, dtype, writers)
        note = f"the card says little of the data ({given.why_no_manifest}): name it with --data"
        is_known = given.manifest is not None or given.state is None or to == "checkpoint"
        done = Export(folder=output, shape=given.model.config, checks=tuple(checks), note="" if is_known else note)
        if push_to:
            address = push(output, push_to, f"{given.title} in {dtype}, by slm_ray/export.py --to {to}")
            done = dataclasses.replace(done, address=address)
        return done


@contextlib.contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output`, which gets its name at the end of the block unless something is raised in it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
            folder = Path(beside) / output.name
            yield folder
            folder.rename(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {reason(error)}") from error


def _writer(to: Format) -> Writer:
    """How a format is written and checked. Raises: UserError when a package for it is not installed."""
    try:
        if to == "gguf":
            from slm_ray.exports.gguf_files.folder import check_gguf, write_gguf_folder

            return write_gguf_folder, check_gguf
        if to == "onnx":
            from slm_ray.exports.onnx_folder import check_onnx, write_onnx

            return write_onnx, check_onnx
    except ModuleNotFoundError as error:
        raise UserError(f"--to {to} needs {error.name}: pip install 'slm-ray[export]'") from error
    return write_hf, check_hf


def _write(
    folder: Path, given: SourceModel, to: Target, dtype: Dtype, writers: Mapping[Format, Writer]
) -> list[Parity]:
    if to == "checkpoint":
        if given.state is None:
            raise UserError(
                f"{given.path} is no checkpoint of ours, and serve/app.py serves it as it is: --to hf copies it"
            )
        checkpoint.copy_for_serving(given.path, folder)
        return []
    wanted = expected(given.model, given.tokenizer)
    folder.mkdir()
    if to != "all":
        return _write_format(folder, given, to, dtype, wanted, writers[to])
    found = []
    for name, writer in writers.items():
        (folder / name).mkdir()
        found += _write_format(folder / name, given, name, dtype, wanted, writer)
    return found


def _write_format(
    folder: Path, given: SourceModel, to: Format, dtype: Dtype, wanted: Expected, writer: Writer
) -> list[Parity]:
    write, check = writer
    write(folder, given, dtype)
    try:
        found = check(folder, given, wanted, dtype)
    except (UserError, OSError):
        raise
    except Exception as error:  # each program that opens it has errors of its own
        raise ParityError(
            f"the {to} export was not written: what it is for cannot open it ({one_line(error)})"
        ) from error
    require(found, f"the {to} export")
    record = {
        "format": to,
        "dtype": dtype,
        "model": given.title,
        "weights_sha256": given.weights_sha256,
        "checks": [parity.to_record() for parity in found],
        "made_with": made_with(),
    }
    write_json(folder / PARITY, record)
    write_card(folder, given, to, dtype, found)
    return found

"""One self-describing folder for a model in training or in service, written so that it is whole or absent.

    model/          Hugging Face layout: config.json, generation_config.json, model.safetensors, tokenizer files
    optimizer.pt    optimizer state, readable with weights_only=True; left out of what is registered and served
    state.json      step, samples seen, seed, world size, data fingerprint, whole config, metrics
    complete.json   the marker, written last: sha256 of every other file

In: model, optimizer and `TrainState` from the loop. Out: the same on any machine. Nothing here is a pickle that must
be trusted. Random numbers need no saving: the loop derives them from (seed, step, rank). `snapshot` copies what the
next step changes, so that `write` may go on beside it.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.model import hf_layout
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer

FORMAT_VERSION = 1
MARKER = "complete.json"
PARTIAL = ".partial"
"""Ends the name of what is being written or removed."""
MODEL, STATE, OPTIMIZER = "model", "state.json", "optimizer.pt"
RENAMED_FIELDS = {"n_unimproved": "n_stale_validations"}
"""Fields of `state.json` under the names that earlier versions wrote."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands; together with weights and optimizer all that resuming needs."""

    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Training samples seen: step x global batch."""
    seed: int
    """Seed of weights, order and dropout."""
    world_size: int
    """Workers at the time of writing; a resumed run may have another number."""
    data_fingerprint: str
    """Which data set."""
    config: dict[str, Any]
    """The whole `TrainConfig`, vocabulary size resolved."""
    metrics: dict[str, float]
    """Metrics of the validation at this step."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """Step and metrics of the best validation so far."""
    n_stale_validations: int = 0
    """Validations since then."""
    run_id: str = ""
    """Run of the tracker, empty without one."""
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)
    """State of the loss scaling, empty unless in fp16."""
    pending_losses: list[float] = dataclasses.field(default_factory=list)
    """Of each rank, the sum of the losses of the steps since the last line of metrics."""
    pending_steps: int = 0
    """How many steps these are: 0 unless the run was asked to stop between two lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model and its optimizer at one moment, in memory of the host that nothing else writes to."""

    config: ModelConfig
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


def snapshot(model: Decoder, optimizer: Mapping[str, Any]) -> Snapshot:
    """Copy the weights and an optimizer's `state_dict`."""
    return Snapshot(config=model.config, weights=_copied(model.state_dict()), optimizer=_copied(dict(optimizer)))


def _copied(value: Any) -> Any:
    """The same nest of dictionaries, lists and tuples, with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(one) for one in value)
    return value


def save(folder: Path, model: Decoder, tokenizer: Tokenizer, state: TrainState, optimizer: Mapping[str, Any]) -> None:
    """Take a snapshot and `write` it."""
    write(folder, snapshot(model, optimizer), tokenizer, state)


def write(folder: Path, content: Snapshot, tokenizer: Tokenizer, state: TrainState) -> None:
    """Write a checkpoint to `folder`, beside it first and renamed when it is whole.

    Raises:
        OSError: it could not be written (disk full, for one); then `folder` is as it was and nothing is left over.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / MODEL).mkdir(parents=True)
        with _disk_errors():
            _write_model(partial / MODEL, content, tokenizer)
            torch.save(content.optimizer, partial / OPTIMIZER)
        _write_json(partial / STATE, dataclasses.asdict(state))
        publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk is an `OSError` from Python, and something else from the C++ of torch and the Rust of safetensors."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def publish(partial: Path, folder: Path) -> None:
    """Write the marker over everything in `partial`, make it durable, and rename it to `folder`."""
    _write_json(partial / MARKER, {"format_version": FORMAT_VERSION, "files": _digests(partial)})
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    if folder.exists():
        remove(folder)
    partial.rename(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a checkpoint: broken off half-way, what is left of it does not look like one."""
    doomed = folder.with_name(folder.name + f".old{PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def copy_for_serving(source: Path, target: Path) -> None:
    """Copy a checkpoint without its optimizer: what is registered, exported and served."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(OPTIMIZER, MARKER))
    publish(partial, target)


def verify(folder: Path) -> None:
    """Check that every file is there and unchanged.

    Raises:
        UserError: the folder is no whole checkpoint; the message names the file.
    """
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        expected = dict(marker["files"])
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no whole checkpoint: it has no {MARKER}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MARKER} cannot be read ({error}): the checkpoint is damaged") from error
    if marker.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {marker.get('format_version')}, expected {FORMAT_VERSION}")
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: the checkpoint is damaged")
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read: {error.strerror}") from error
        if found != digest:
            raise UserError(f"{folder / name} is not what was written (its sha256 differs): the checkpoint is damaged")


def file_digest(folder: Path, name: str) -> str:
    """sha256 of one file of a verified checkpoint, as its marker has it."""
    return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"][name])


def load_state(folder: Path) -> TrainState:
    """Read `state.json`. Raises: UserError when it cannot be read."""
    try:
        fields = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for old, new in RENAMED_FIELDS.items():
            if old in fields:
                fields[new] = fields.pop(old)
        return TrainState(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / STATE} cannot be read: {error}") from error


def load_model(folder: Path) -> tuple[Decoder, Tokenizer]:
    """Verify a checkpoint and build its model, in eval mode on the CPU, with its tokenizer.

    Raises:
        UserError: the folder is damaged or no checkpoint.
    """
    verify(folder)
    path = folder / MODEL
    try:
        content = json.loads((path / "config.json").read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no model: {error}") from error
    model = Decoder(hf_layout.model_config(content, str(path / "config.json")))
    try:
        model.load_state_dict(hf_layout.from_hf(tensors, model.config))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path / 'model.safetensors'} does not fit its config.json: {error}") from error
    return model.eval(), Tokenizer.load(path / "tokenizer.json")


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Read the optimizer's state. Raises: UserError when the folder has none (it was made for serving)."""
    if not (folder / OPTIMIZER).is_file():
        raise UserError(f"{folder} has no {OPTIMIZER}: it was made for serving and cannot be resumed")
    state: dict[str, Any] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    return state


def _write_model(path: Path, content: Snapshot, tokenizer: Tokenizer) -> None:
    config = content.config
    _write_json(path / "config.json", hf_layout.config_json(config, tokenizer.eos_id))
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    _write_json(path / "generation_config.json", ends)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": config.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(path / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(path / "tokenizer.json")
    tensors = hf_layout.to_hf(content.weights, config)
    safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

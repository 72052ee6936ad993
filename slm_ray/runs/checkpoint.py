"""One self-describing folder for a model in training or in service, written so that it is complete or absent.

    model/          Hugging Face layout: config.json, generation_config.json, model.safetensors, tokenizer files,
                    chat_template.jinja
    optimizer.pt    optimizer state, readable with weights_only=True; left out of what is registered and served
    state.json      step, samples seen, seed, world size, data fingerprint, whole config, metrics
    complete.json   the marker, written last: sha256 of every other file

In: model, optimizer and `TrainState` from the loop. Out: the same on any machine. Nothing here is a pickle that must
be trusted. Random numbers need no saving: the loop derives them from (seed, step, rank). `snapshot` copies what the
next step changes, so that `write` may go on beside it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from slm_ray import storage
from slm_ray.config.places import portable_config
from slm_ray.config.schema import ModelConfig
from slm_ray.corpus.instructions import CHAT_TEMPLATE, INSTRUCTION_TEMPLATE, STORY_TEMPLATE, takes_instructions
from slm_ray.errors import UserError
from slm_ray.model_files.json_files import read_json
from slm_ray.runs.train_state import TrainState
from slm_ray.runs.verification import FORMAT_VERSION, MARKER, STATE, read_errors, verify
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:  # who looks at a checkpoint's state alone need not wait for torch
    from torch import Tensor

    from slm_ray.model.decoder import Decoder

PARTIAL = ".partial"
"""Ends the name of what is being written or removed."""
_DOOMED = f".old{PARTIAL}"
MODEL, OPTIMIZER = "model", "optimizer.pt"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every file was verified, with its state: it is not verified again."""

    path: Path
    state: TrainState

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Verify a folder, once.

        Raises:
            UserError: it is corrupt or no checkpoint.
        """
        verify(folder)
        return cls(folder, load_state(folder))

    def model(self) -> "Decoder":
        """Build its model, in eval mode on the CPU. Raises: UserError when the weights do not fit the config."""
        from slm_ray.model_files.reading import read_model

        return read_model(self.path / MODEL)

    def optimizer(self) -> dict[str, Any]:
        """Read the optimizer's state. Raises: UserError when the folder has none (it was made for serving)."""
        if not (self.path / OPTIMIZER).is_file():
            raise UserError(f"{self.path} has no {OPTIMIZER}: it was made for serving and cannot be resumed")
        import torch

        state: dict[str, Any] = torch.load(self.path / OPTIMIZER, map_location="cpu", weights_only=True)
        return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A model and its optimizer at one moment, in memory of the host that nothing else writes to."""

    config: ModelConfig
    weights: "dict[str, Tensor]"
    optimizer: dict[str, Any]


def snapshot(model: "Decoder", optimizer: Mapping[str, Any]) -> Snapshot:
    """Copy the weights and an optimizer's `state_dict`."""
    return Snapshot(config=model.config, weights=_copied(model.state_dict()), optimizer=_copied(dict(optimizer)))


def _copied(value: Any) -> Any:
    """The same nest of dictionaries, lists and tuples, with every tensor copied to the CPU."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(one) for one in value)
    return value


def save(
    folder: Path,
    model: "Decoder",
    tokenizer: Tokenizer,
    state: TrainState,
    optimizer: Mapping[str, Any],
    chat_template: str = STORY_TEMPLATE,
) -> None:
    """Take a snapshot and `write` it."""
    write(folder, snapshot(model, optimizer), tokenizer, state, chat_template)


def write(
    folder: Path, content: Snapshot, tokenizer: Tokenizer, state: TrainState, chat_template: str = STORY_TEMPLATE
) -> None:
    """Write a checkpoint to `folder`, beside it first and renamed when it is complete.

    `chat_template` is one of the two of `corpus.instructions`: which prompt the model was trained for.

    Raises:
        OSError: it could not be written (disk full, for one); then `folder` is as it was and nothing is left over.
    """
    import torch

    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / MODEL).mkdir(parents=True)
        with _as_os_errors():
            _write_model(partial / MODEL, content, tokenizer)
            (partial / MODEL / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
            torch.save(content.optimizer, partial / OPTIMIZER)
        _write_json(partial / STATE, state.to_record())
        commit_partial(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """A full disk is an `OSError` from Python, and something else from the C++ of torch and the Rust of safetensors."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def commit_partial(partial: Path, folder: Path) -> None:
    """Write the marker over everything in `partial`, make it durable, and rename it to `folder`."""
    _write_json(partial / MARKER, {"format_version": FORMAT_VERSION, "files": _digests(partial)})
    for path in partial.rglob("*"):
        _sync(path)
    _sync(partial)
    doomed = folder.with_name(folder.name + _DOOMED)
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():  # aside first and removed last: a kill in between leaves the one or the other
        folder.rename(doomed)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a checkpoint: broken off half-way, what is left of it does not look like one."""
    doomed = folder.with_name(folder.name + _DOOMED)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def copy_for_serving(source: Path, target: Path) -> None:
    """Copy a checkpoint without its optimizer and without any place of its maker: what is registered and exported.

    Raises:
        UserError: its `state.json` cannot be read.
    """
    state = load_state(source)
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(OPTIMIZER, MARKER))
    _write_json(partial / STATE, dataclasses.replace(state, config=portable_config(state.config)).to_record())
    commit_partial(partial, target)


def load_state(folder: Path) -> TrainState:
    """Read `state.json`. Raises: as `verify`."""
    path = folder / STATE
    try:
        with read_errors(path):
            return TrainState.from_record(read_json(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be read by this version: {error}") from error


def load_model(folder: Path) -> "tuple[Decoder, Tokenizer]":
    """Verify a checkpoint and build its model, in eval mode on the CPU, with its tokenizer.

    Raises:
        UserError: the folder is corrupt or no checkpoint, or its tokenizer has tokens that the model does not know.
    """
    from slm_ray.model_files.reading import read_model

    verify(folder)
    path = folder / MODEL / "tokenizer.json"
    model, tokenizer = read_model(folder / MODEL), Tokenizer.load(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path} has the token {tokenizer.vocab_size - 1} and the vocabulary of its model ends at "
            f"{model.config.vocab_size - 1}: they are not of one another"
        )
    return model, tokenizer


def has_instructions(folder: Path) -> bool:
    """Whether the model of a checkpoint was trained with instructions before its stories.

    Its template is compared with ours and never rendered; a folder without one, as earlier versions wrote, has none.
    """
    try:
        return is_instruction_template(folder / MODEL / CHAT_TEMPLATE)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_instruction_template(path: Path) -> bool:
    """Whether a file holds our template of instructions. Raises: OSError."""
    with path.open("rb") as file:
        content = file.read(2 * len(INSTRUCTION_TEMPLATE))  # a longer one is another
    return takes_instructions(content.decode("utf-8", errors="replace"))


def _write_model(path: Path, content: Snapshot, tokenizer: Tokenizer) -> None:
    import safetensors.torch

    from slm_ray.model import hf_layout

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
    return {path.relative_to(folder).as_posix(): storage.file_sha256(path) for path in files}


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""A model that is given away: its weights, its tokenizer and what is known of where it comes from.

In: a reference to a model, perhaps a data set. Out: a `SourceModel`, of files that were verified.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import Manifest, load_manifest
from slm_ray.errors import UserError, one_line, visible, without_secrets
from slm_ray.model.decoder import Decoder
from slm_ray.model_files.folders import TOKENIZER, model_file
from slm_ray.model_files.json_files import MAX_JSON_BYTES
from slm_ray.runs import checkpoint
from slm_ray.runs.train_state import TrainState
from slm_ray.storage import is_remote, read_at_most
from slm_ray.tokenization.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer
from slm_ray.tracking.evaluation_runs import recorded_evaluation
from slm_ray.tracking.registry import REGISTERED, load_model, resolved_model, weights_digest

CHAT_TEMPLATE = "chat_template.jinja"
SHORT = 12
"""Digits of a fingerprint in a sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SourceModel:
    """See the module."""

    name: str
    """Of the registered model, or of the run where it is a folder."""
    version: str
    """Of the registered model, or `step-N`."""
    path: Path
    """Its folder: a checkpoint, or a model of others in Hugging Face's layout."""
    state: TrainState | None
    """Of the checkpoint; None of a model of others."""
    model: Decoder
    """In eval mode on the CPU."""
    tokenizer: Tokenizer
    run_id: str
    """Of the tracked run, empty without one."""
    weights_sha256: str
    manifest: Manifest | None
    """Of the data set that it was trained on last, where that is at hand."""
    why_no_manifest: str
    """Why it is not; empty where it is."""
    evaluation: Mapping[str, str]
    """What promotion recorded of the registered version, by name; empty where nothing is."""

    @property
    def folder(self) -> Path:
        """Its files in Hugging Face's layout."""
        return self.path if self.state is None else self.path / checkpoint.MODEL

    @property
    def title(self) -> str:
        """Name and version, on one line."""
        return visible(f"{self.name} {self.version}")

    @property
    def chat_template(self) -> str:
        """The template of conversations that the folder holds; empty without one."""
        return (self.content(CHAT_TEMPLATE) or b"").decode("utf-8", errors="replace")

    def content(self, name: str) -> bytes | None:
        """Of one of its files beside the weights; None where there is none.

        Raises:
            UserError: it cannot be read, is a link out of the folder, or larger than any such file.
        """
        most = MAX_TOKENIZER_BYTES if name == TOKENIZER else MAX_JSON_BYTES
        try:
            path = model_file(self.folder, name)
            return None if path is None else read_at_most(path, most)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name} cannot be read: {one_line(error)}") from error


@contextlib.contextmanager
def opened(reference: str, data: str = "", tracking_uri: str = "") -> Iterator[SourceModel]:
    """Open a model for the length of a block.

    data: folder of the data set that it was trained on; where the run had it, or where one lies by default, when not
    given.

    Raises:
        RegistryError: there is no such model, or the store does not answer.
        UserError: it is corrupt or no checkpoint, or `data` is not what it was trained on.
    """
    with resolved_model(reference, tracking_uri) as found:
        model, tokenizer = load_model(found)
        state = None if found.is_foreign else checkpoint.load_state(found.path)
        manifest, why = _manifest(state, data)
        is_registered = reference.startswith(REGISTERED)
        yield SourceModel(
            name=found.name,
            version=found.version,
            path=Path(found.path),
            state=state,
            model=model,
            tokenizer=tokenizer,
            run_id=found.run_id or (state.run_id if state else ""),
            weights_sha256=weights_digest(found),
            manifest=manifest,
            why_no_manifest=why,
            evaluation=recorded_evaluation(found.name, found.version, tracking_uri) if is_registered else {},
        )


def _manifest(state: TrainState | None, data: str) -> tuple[Manifest | None, str]:
    """The data set that the last steps saw: the given one, or one of the same fingerprint where it is likely to lie;
    and where there is none, why not."""
    if state is None:
        if data:
            raise UserError("--data is what a checkpoint was trained on, and this is a model that others made")
        return None, "others made it"
    wanted = state.data_fingerprint
    if data:
        manifest = load_manifest(data)
        if manifest.fingerprint != wanted:
            raise UserError(
                f"{data} is data set {manifest.fingerprint[:SHORT]}, and the model was trained on {wanted[:SHORT]}: "
                "name the folder of that one with --data, or leave it out"
            )
        return manifest, ""
    why = []
    for place in dict.fromkeys((str(state.config.get("data") or TrainConfig.data), TrainConfig.data)):
        if is_remote(place):  # an address that nobody typed here is not asked
            why.append(f"{without_secrets(place)} is an address")
            continue
        try:
            manifest = load_manifest(place)
        except UserError as error:
            why.append(str(error))
        else:
            if manifest.fingerprint == wanted:
                return manifest, ""
            why.append(f"{place} is data set {manifest.fingerprint[:SHORT]}, not {wanted[:SHORT]}")
    return None, "; ".join(why)

"""A GGUF file in a folder, checked by what can be read out of it, and by llama.cpp where that is installed.

In: a `SourceModel` and a number format. Out: `NAME-DTYPE.gguf`.
"""

import dataclasses
import logging
import re
from pathlib import Path

from slm_ray.exports.data_card import licence
from slm_ray.exports.formats import GGUF_ENDS, Dtype
from slm_ray.exports.gguf_files.file import Description, write_gguf
from slm_ray.exports.gguf_files.llamacpp import LlamaCppRuntime, slack
from slm_ray.exports.gguf_files.reading import largest_weight_error, read_back
from slm_ray.exports.hf_runtimes import is_installed
from slm_ray.exports.parity import Expected, Parity, compare
from slm_ray.exports.source_model import SHORT, SourceModel

LOGGER = logging.getLogger(__name__)


def write_gguf_folder(folder: Path, given: SourceModel, dtype: Dtype) -> None:
    """Write the file into a folder that is there.

    Raises:
        UserError: llama.cpp has no such architecture, or no tokenizer that gives the same ids.
        OSError: it could not be written.
    """
    about = Description(
        name=given.title, license=licence(given).lower(), source=_source(given), chat_template=given.chat_template
    )
    write_gguf(_path(folder, given, dtype), given.model, given.tokenizer, about, dtype)
    if lost := given.tokenizer.borders.end_ids[GGUF_ENDS:]:
        LOGGER.warning("a GGUF file names %d ends of a text: in llama.cpp %s do not end one", GGUF_ENDS, lost)


def _source(given: SourceModel) -> str:
    state = given.state
    if state is None:
        return f"Weights with the sha256 {given.weights_sha256}, exported by SLM-Ray"
    data = f"data set {state.data_fingerprint[:SHORT]}; the licence is of the code that made it"
    return f"Step {state.step} of run {given.run_id or 'not tracked'}, trained on {data}"


def check_gguf(folder: Path, given: SourceModel, wanted: Expected, dtype: Dtype) -> list[Parity]:
    """Read the file back: every weight within what its number format allows, then logits, tokens and ids.

    Raises:
        ParityError: it cannot be read back, or a weight is further off.
    """
    path = _path(folder, given, dtype)
    largest_weight_error(path, given.model, dtype)
    wanted = dataclasses.replace(wanted, end_ids=frozenset(given.tokenizer.borders.end_ids[:GGUF_ENDS]))
    found = [compare(read_back(path), wanted, dtype)]
    if is_installed("llama_cpp"):
        with LlamaCppRuntime(path, given.tokenizer.stop_ids) as runtime:
            found.append(compare(runtime, wanted, dtype, slack(given.model.config)))
    return found


def _path(folder: Path, given: SourceModel, dtype: Dtype) -> Path:
    """In the manner of such files: `tinystories-3-f16.gguf`."""
    plain = re.sub(r"[^\w.-]+", "-", f"{given.name}-{given.version}").strip("-.") or "model"
    return folder / f"{plain[:100]}-{dtype}.gguf"

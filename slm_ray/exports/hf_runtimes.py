"""Programs that open an export in Hugging Face's layout, as `Runtime`s: transformers, or our own reader.

In: a folder. Out: what each computes of it. `parity` compares that with torch.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from numpy.typing import NDArray

from slm_ray.exports.parity import TorchRuntime
from slm_ray.model_files.foreign_tokenizer import read_tokenizer
from slm_ray.model_files.reading import read_model

Array = NDArray[Any]
TOKENIZER = "tokenizer.json"


def is_installed(package: str) -> bool:
    """Whether a program that an export is for is at hand."""
    return importlib.util.find_spec(package) is not None


def encoder(folder: Path) -> Any:
    """`tokenizer.json` in `tokenizers`, as anybody opens it, but that the letters of a special token are text."""
    found = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    found.encode_special_tokens = True
    return found


def own_folder(folder: Path) -> TorchRuntime:
    """Our own reader, for a shape that transformers does not know, or where it is not installed."""
    words, stop_ids = encoder(folder), read_tokenizer(folder).stop_ids
    return TorchRuntime(
        read_model(folder), lambda text: list(words.encode(text, add_special_tokens=False).ids), stop_ids, "slm-ray"
    )


@contextlib.contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """No bars and warnings of transformers within the block: what is wrong is found by comparing."""
    level, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if has_bars:
            log.enable_progress_bar()


class TransformersRuntime:
    """`AutoModelForCausalLM` and `AutoTokenizer` in fp32, with the weights and the ends that are in the folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        with _quiet(transformers.utils.logging):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        self._model: Any = found.eval()
        ends = self._model.generation_config.eos_token_id
        self.stop_ids = frozenset(ends if isinstance(ends, list) else [ends])
        # in place of the rest that the folder says, which may have penalties
        self._greedy = transformers.GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=min(self.stop_ids)
        )
        self._model.generation_config = self._greedy  # which fills in what is not given to `generate`
        self._log = transformers.utils.logging

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        with _quiet(self._log):  # it warns of texts that are longer than the context
            found = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(found["input_ids"])

    def logits(self, tokens: Sequence[int]) -> Array:
        """See `Runtime`."""
        with torch.inference_mode():
            values: Array = self._model(torch.tensor([list(tokens)])).logits[0].float().numpy()
        return values

    def write(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Runtime`."""
        if not count:
            return []
        ids = torch.tensor([list(tokens)])
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            self._greedy.max_new_tokens = count  # given beside it, transformers says that this is deprecated
            found = self._model.generate(ids, attention_mask=mask, generation_config=self._greedy)
        return [int(token) for token in found[0, len(tokens) :]]

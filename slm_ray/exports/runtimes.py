"""Programs that open an export, as `Runtime`s: transformers, plain ONNX Runtime, ONNX Runtime GenAI.

In: a folder of an export. Out: what each computes of it. `parity` compares that with torch.
"""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers
import torch
from numpy.typing import NDArray

from slm_ray.exports.parity import TorchRuntime, greedy
from slm_ray.runs.checked_files import read_model

Array = NDArray[Any]
TOKENIZER = "tokenizer.json"


def is_installed(package: str) -> bool:
    """Whether a program that an export is for is at hand."""
    return importlib.util.find_spec(package) is not None


def _encoder(folder: Path) -> Any:
    """`tokenizer.json` in `tokenizers`, as anybody opens it, but that the letters of a special token are text."""
    found = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    found.encode_special_tokens = True
    return found


def own_folder(folder: Path, eos_id: int) -> TorchRuntime:
    """Our own reader, for a shape that transformers does not know, or where it is not installed."""
    encoder = _encoder(folder)
    return TorchRuntime(
        read_model(folder), lambda text: list(encoder.encode(text, add_special_tokens=False).ids), eos_id, "slm-ray"
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
    """`AutoModelForCausalLM` and `AutoTokenizer` in fp32, with the weights as they are in the folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        with _quiet(transformers.utils.logging):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        self._model: Any = found.eval()
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
            found = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, num_beams=1
            )
        return [int(token) for token in found[0, len(tokens) :]]


class OnnxRuntime:
    """Plain ONNX Runtime and `tokenizers`: a graph without a cache, or one with a cache that is carried along."""

    def __init__(self, folder: Path, graph: str, eos_id: int) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = str(folder / graph)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._encoder = _encoder(folder)
        self._eos_id = eos_id
        self._past = {
            one.name: tuple(one.shape) for one in self._session.get_inputs() if one.name.startswith("past_key_values.")
        }
        self.name = f"onnxruntime {onnxruntime.__version__}, {graph}"

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def logits(self, tokens: Sequence[int]) -> Array:
        """See `Runtime`."""
        return self._run(tokens, {})[0]

    def write(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Runtime`."""
        seen, cache = list[int](), dict[str, Array]()

        def last_logits(ahead: Sequence[int]) -> Array:
            seen.extend(ahead)
            if not self._past:
                found: Array = self._run(seen, {})[0][-1]
                return found
            logits, fresh = self._run(ahead, cache)
            cache.update(fresh)
            return logits[-1]  # type: ignore[no-any-return]

        return greedy(last_logits, tokens, count, self._eos_id)

    def _run(self, tokens: Sequence[int], cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Logits (T, vocab_size), and the cache for the next call."""
        feed: dict[str, Array] = {"input_ids": np.array([list(tokens)], dtype=np.int64)}
        for name, (_, heads, _, width) in self._past.items():
            feed[name] = cache.get(name, np.zeros((1, heads, 0, width), np.float32))
        if self._past:
            total = len(tokens) + feed[next(iter(self._past))].shape[2]
            feed["attention_mask"] = np.ones((1, total), np.int64)
        names = [one.name for one in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(None, feed), strict=True))
        logits = found.pop("logits")[0]
        return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}


class GenAiRuntime:
    """ONNX Runtime GenAI, which opens a folder by its `genai_config.json`."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        self.name = f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}"

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def logits(self, tokens: Sequence[int]) -> Array:
        """See `Runtime`."""
        generator = self._generator(len(tokens) + 1)
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        found: Array = generator.get_output("logits")
        return found[0]  # type: ignore[no-any-return]

    def write(self, tokens: Sequence[int], count: int) -> list[int]:
        """See `Runtime`."""
        generator = self._generator(len(tokens) + count)
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        written: list[int] = []
        while len(written) < count and not generator.is_done():
            generator.generate_next_token()
            written.append(int(generator.get_next_tokens()[0]))
        return written

    def _generator(self, length: int) -> Any:
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(do_sample=False, max_length=length)
        return self._genai.Generator(self._model, options)

"""Programs that open an export as ONNX, as `Runtime`s: plain ONNX Runtime, and ONNX Runtime GenAI.

In: a folder. Out: what each computes of it. `parity` compares that with torch.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from slm_ray.exports.hf_runtimes import encoder
from slm_ray.exports.parity import greedy

Array = NDArray[Any]
GENAI_CONFIG = "genai_config.json"


class OnnxRuntime:
    """Plain ONNX Runtime and `tokenizers`: a graph without a cache, or one with a cache that is carried along."""

    def __init__(self, folder: Path, graph: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = str(folder / graph)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._encoder = encoder(folder)
        known = self._session.get_modelmeta().custom_metadata_map
        self.stop_ids = frozenset(map(int, known["end_token_ids"].split(",")))
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

        return greedy(last_logits, tokens, count, self.stop_ids)

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
        ends = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["eos_token_id"]
        self.stop_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self._model = onnxruntime_genai.Model(str(folder))
        self._tokenizer = onnxruntime_genai.Tokenizer(self._model)
        self.name = f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}"

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def logits(self, tokens: Sequence[int]) -> Array:
        """See `Runtime`."""
        generator = self._generator(len(tokens))
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

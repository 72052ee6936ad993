"""A model that is ready to serve: loaded, verified, warmed up, with its engine's thread.

In: a resolved reference. Out: futures of continuations. `rollout.py` decides which loaded model is the current one. A
model that does not answer the fixed prompts is not loaded.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from serve.models.description import ModelDescription, ModelVersion
from slm_ray.config.devices import DeviceName
from slm_ray.corpus.instructions import instruction_prompt, words_instruction
from slm_ray.generation.backend_choice import BackendName, make_backend
from slm_ray.generation.cache_size import check_weights
from slm_ray.generation.engine import Engine, PromptError
from slm_ray.generation.engine_thread import EngineClosedError, EngineThread, Load, Order
from slm_ray.generation.golden import BrokenModelError, fitting_prompts
from slm_ray.generation.request import Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.model.decoder import count_parameters
from slm_ray.model.device import find_device, moved
from slm_ray.runs import checkpoint
from slm_ray.tracking.registry import REGISTERED, ResolvedModel, has_instructions, load_model

ANSWER_TOKENS = 24


class InstructionError(PromptError):
    """Words were given to a model that knows no instructions."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The greedy continuation of a fixed prompt."""

    prompt: str
    text: str
    seconds: float


class LoadedModel:
    """One version of a model with its engine. Its files are needed no more.

    Raises:
        UserError: the checkpoint is corrupt, the files of a foreign model do not fit each other, or no such device.
        BrokenModelError: its logits are not finite, or it writes no text.
    """

    def __init__(
        self,
        source: ResolvedModel,
        max_slots: int = 8,
        max_waiting: int = 64,
        backend: BackendName = "auto",
        threads: int = 1,
        device: DeviceName = "cpu",
    ) -> None:
        weights = source.path / checkpoint.MODEL / "model.safetensors"
        if weights.is_file():  # a process that runs out of memory is killed, with the version that serves
            check_weights(weights.stat().st_size)
        model, tokenizer = load_model(source)
        self.tokenizer = tokenizer
        self.identity = source.identity
        self.has_instructions = has_instructions(source)
        self.is_registered = source.identity.startswith(REGISTERED) and bool(source.run_id)
        self.version = ModelVersion(
            name=source.name,
            version=source.version,
            run_id=source.run_id,
            data_fingerprint=source.data_fingerprint,
        )
        self.description = ModelDescription(
            **self.version.model_dump(),
            step=source.step,
            parameters=count_parameters(model),
            seq_len=model.config.seq_len,
            vocab_size=model.config.vocab_size,
            has_instructions=self.has_instructions,
            evaluation={} if source.is_foreign else _evaluation(source.path),
        )
        self.loaded_at = int(time.time())
        placed = moved(model, find_device(device, backend))
        engine = Engine(make_backend(placed, max_slots, backend, threads), tokenizer)
        self.answers = warm_up(engine, self.title)
        self._thread: EngineThread | None = EngineThread(engine, max_waiting)

    @property
    def title(self) -> str:
        """Name and version, in words."""
        return f"{self.version.name} {self.version.version}"

    def prompt_of(self, said: str) -> str:
        """The prompt that answers what a user said in a conversation: an instruction, or the beginning of a story.

        Which of the two the folder's template tells by its bytes: no template out of a folder is ever run.
        """
        return instruction_prompt(said) if self.has_instructions else said

    def prompt_with_words(self, words: Sequence[str], beginning: str) -> str:
        """The prompt of a story that begins so and uses these words.

        Raises:
            InstructionError: the model was trained without instructions.
        """
        if not self.has_instructions:
            raise InstructionError("the model that is served was trained without instructions: leave them out")
        return instruction_prompt(words_instruction(words)) + beginning.lstrip()

    @property
    def answer_s(self) -> float:
        """Seconds that the fixed prompts took together."""
        return sum(answer.seconds for answer in self.answers)

    @property
    def load(self) -> Load:
        """How many requests run and how many wait, about now."""
        thread = self._thread
        return Load(0, 0) if thread is None else thread.load

    def submit_all(self, orders: Sequence[Order]) -> "list[Future[Completion]]":
        """Ask for continuations, all or none.

        Raises:
            PromptError, EngineBusyError, EngineClosedError: as `EngineThread.submit_all`.
        """
        thread = self._thread
        if thread is None:
            raise EngineClosedError("the engine is closed")
        return thread.submit_all(orders)

    def submit(self, prompt: str | Sequence[int], params: SamplingParams) -> "Future[Completion]":
        """Ask for one continuation. Raises: as `submit_all`."""
        return self.submit_all([Order(prompt, params)])[0]

    @property
    def failures(self) -> int:
        """Stories that failed, one after another, since the last that did not."""
        thread = self._thread
        return 0 if thread is None else thread.failures

    def close(self, drain_s: float = 0) -> None:
        """Take no more requests, let those that run or wait finish for so long, fail the rest, free the memory.

        May be called again meanwhile: the shorter time counts.
        """
        thread = self._thread
        if thread is not None:
            thread.close(drain_s)
        self._thread = None


def _evaluation(folder: Path) -> dict[str, float]:
    """The metrics of a checkpoint that are numbers: JSON has no others."""
    metrics = checkpoint.load_state(folder).metrics
    return {name: value for name, value in (metrics.metrics if metrics else {}).items() if math.isfinite(value)}


def warm_up(engine: Engine, title: str) -> tuple[Answer, ...]:
    """Let a model continue the fixed prompts greedily, alone and with every slot in use.

    Prompts that a small context does not hold are left out; the empty one is always there.

    Raises:
        BrokenModelError: logits that are not finite, or no text after any of them.
    """
    prompts = fitting_prompts(engine.tokenizer, engine.backend.config.seq_len)
    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0)
    for prompt in prompts:
        logits = engine.backend.prefill(0, [engine.tokenizer.start_id, *engine.tokenizer.encode(prompt)])
        if logits is None or not np.isfinite(logits).all():
            raise BrokenModelError(f"{title} gives numbers that are not finite after {prompt!r}: it is not served")
    engine.generate([prompts[-1]] * engine.backend.max_slots, [params] * engine.backend.max_slots)
    answers = tuple(_answer(engine, prompt, params) for prompt in prompts)
    if not any(answer.text.strip() for answer in answers):
        raise BrokenModelError(f"{title} writes nothing after any of {prompts}: it is not served")
    return answers


def _answer(engine: Engine, prompt: str, params: SamplingParams) -> Answer:
    start = time.perf_counter()
    (completion,) = engine.generate([prompt], [params])
    return Answer(prompt, completion.text, time.perf_counter() - start)

"""A model that is ready to write: read, described, and shared by its engine's thread. Ray is not known here.

In: a resolved reference. Out: futures of continuations. `rollout.py` says which loaded model is the current one.
"""

from collections.abc import Sequence
from concurrent.futures import Future

from serve.schemas import ModelDescription, ModelVersion
from slm_ray.backend import TorchBackend
from slm_ray.checkpoint import load_model
from slm_ray.engine import Engine
from slm_ray.engine_thread import EngineThread, Load, OnPiece
from slm_ray.model import count_parameters
from slm_ray.registry import ResolvedModel
from slm_ray.sampling import SamplingParams
from slm_ray.story import Completion


class LoadedModel:
    """One version of a model with its engine."""

    def __init__(self, source: ResolvedModel, max_rows: int = 8, max_waiting: int = 64) -> None:
        model, tokenizer = load_model(source.path)
        config = model.config
        self.tokenizer = tokenizer
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
            seq_len=config.seq_len,
            vocab_size=config.vocab_size,
        )
        self._thread = EngineThread(Engine(TorchBackend(model, max_rows), tokenizer), max_waiting)

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, on_piece: OnPiece | None = None
    ) -> "Future[Completion]":
        """Ask for a continuation.

        Raises:
            PromptError, EngineBusyError, EngineClosedError: as `EngineThread.submit`.
        """
        return self._thread.submit(prompt, params, on_piece)

    @property
    def load(self) -> Load:
        """How much there is to do."""
        return self._thread.load

    def close(self) -> None:
        """Stop writing."""
        self._thread.close()

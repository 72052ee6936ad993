"""Which version of the model is served. Ray is not known here.

In: a reference, as `models:/tinystories@champion`. Out: the loaded model behind it, to which requests are given.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from serve.loaded_model import LoadedModel
from serve.schemas import RolloutStatus
from slm_ray.engine_thread import OnPiece
from slm_ray.hardware import cpu_count
from slm_ray.registry import resolve_model
from slm_ray.sampling import SamplingParams
from slm_ray.story import Completion


class Rollout:
    """The current model: what the routes ask."""

    def __init__(self, current: LoadedModel) -> None:
        self.current = current
        self.status = RolloutStatus()
        self.is_ready = True

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams, on_piece: OnPiece | None = None
    ) -> "tuple[LoadedModel, Future[Completion]]":
        """Ask the current model for a continuation; gives the model that writes it too.

        Raises:
            PromptError, EngineBusyError, EngineClosedError: as `EngineThread.submit`.
        """
        model = self.current
        return model, model.submit(prompt, params, on_piece)

    async def close(self) -> None:
        """Stop writing."""
        await asyncio.to_thread(self.current.close)


def start_rollout(reference: str, tracking_uri: str, replicas: int) -> Rollout:
    """Load a model in a process that shares its machine with the HTTP proxy and the other replicas.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    # One core is left to the proxy. More than four threads only wait for each other on models of this size.
    torch.set_num_threads(max(1, min(4, cpu_count() // replicas - 1)))
    return Rollout(LoadedModel(resolve_model(reference, tracking_uri)))

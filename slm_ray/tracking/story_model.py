"""A registered version as MLflow's own flavor `python_function`: beginnings of stories in, whole stories out.

MLflow keeps this file beside the checkpoint and runs it when the version is loaded (models from code): no pickle is
written or read. `mlflow.pyfunc.load_model("models:/tinystories@champion").predict(["Once upon a time"])`.
"""

from pathlib import Path
from typing import Any

import mlflow

from slm_ray.generation.backend_choice import make_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.runs.checkpoint import load_model

CHECKPOINT = "checkpoint"
"""Name of the artifact that holds the checkpoint's folder."""
MAX_SLOTS = 8


class StoryModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Writes on, each prompt a story, with the options of the server as `params`."""

    def load_context(self, context: Any) -> None:
        """Verify and load the checkpoint. Raises: UserError when it is corrupt."""
        model, tokenizer = load_model(Path(context.artifacts[CHECKPOINT]))
        self._engine = Engine(make_backend(model, MAX_SLOTS), tokenizer)

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """The stories, each with its prompt.

        params: max_tokens, temperature, top_k, top_p, repetition_penalty and seed (below 0 a fresh one each time).

        Raises:
            UserError, ValueError: a prompt is too long, a parameter is out of its range.
        """
        del context
        prompts = list(model_input)
        options = dict(params or {})
        seed = options.pop("seed", -1)
        sampling = SamplingParams(**options, seed=None if seed < 0 else seed)
        found = self._engine.generate(prompts, [sampling] * len(prompts))
        return [prompt + completion.text for prompt, completion in zip(prompts, found, strict=True)]


mlflow.models.set_model(StoryModel())

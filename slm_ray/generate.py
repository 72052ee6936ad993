"""Command line: let a model write stories.

In: a model reference and the beginnings of stories. Out: the stories on the terminal, several of them written at once.

    python slm_ray/generate.py --model models:/tinystories@champion --prompt "Once upon a time" --max-tokens 200
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.generate")

import dataclasses
from collections.abc import Sequence

from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.config.options import parse
from slm_ray.errors import UserError
from slm_ray.generation.cache_size import check_cache
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.runs.checkpoint import load_model
from slm_ray.sources.addresses import as_text
from slm_ray.tracking.registry import resolved_model

AT_ONCE = 8
"""Stories that are written at the same time; more take turns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Write stories with a trained model and print them."""

    model: str = "models:/tinystories@champion"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION) or folder of a checkpoint."""
    prompt: tuple[str, ...] = ("Once upon a time",)
    """Beginning of the story; several give several stories. An empty one lets the model begin."""
    max_tokens: int = 200
    """Most tokens to write after the prompt, at least 1; a story may end before by itself."""
    temperature: float = 0.7
    """Divides the logits, 0 to 100: higher is more surprising, 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 draws among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability, above 0 to 1."""
    repetition_penalty: float = 1.0
    """Weighs down tokens that were there already, 0.1 to 10; 1 does not."""
    stop: tuple[str, ...] = ()
    """Texts that end a story before them."""
    seed: int | None = None
    """The same seed writes the same story; a fresh one each time when not given."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""

    def sampling(self) -> SamplingParams:
        """How each story is written.

        Raises:
            UserError: an option is out of its range.
        """
        try:
            return SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                stop=self.stop,
                seed=self.seed,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


def write_stories(config: GenerateConfig) -> list[str]:
    """The stories, each with its prompt, in the order of the prompts.

    Raises:
        UserError: no such model, a corrupt one, one whose cache is too large for this machine, a prompt longer than its
            context, or an option out of range.
    """
    params = config.sampling()
    with resolved_model(config.model, config.tracking_uri) as found:
        model, tokenizer = load_model(found.path)
    slots = max(1, min(len(config.prompt), AT_ONCE))
    check_cache(model.config, slots, "it is no model for this machine" if slots == 1 else "give fewer prompts at once")
    completions = Engine(TorchBackend(model, slots), tokenizer).generate(config.prompt, [params] * len(config.prompt))
    return [prompt + completion.text for prompt, completion in zip(config.prompt, completions, strict=True)]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, write, print."""
    set_default_environment()
    about = (GenerateConfig.__doc__ or "").splitlines()[0]
    config = parse(GenerateConfig, argv, prog="generate.py", about=about, default=GenerateConfig())
    prompt, stop = (tuple(map(as_text, texts)) for texts in (config.prompt, config.stop))  # where the locale is ASCII
    config = dataclasses.replace(config, prompt=prompt, stop=stop)
    print("\n\n".join(write_stories(config)))
    return 0

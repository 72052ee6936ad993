"""Command line: let a model write stories.

In: a model reference and the beginnings of stories: given, in a file, or typed one after another. Out: the stories on
the terminal as they are written, several of them at once, in the order of their beginnings; or a JSON object for each.

    python slm_ray/generate.py --model models:/tinystories@champion --prompt "Once upon a time" --max-tokens 200
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.generate")

import collections
import contextlib
import dataclasses
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence

from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.config.devices import DeviceName
from slm_ray.config.options import parse
from slm_ray.errors import UserError, visible_lines
from slm_ray.generation.backend import BackendName
from slm_ray.generation.cache_size import check_cache
from slm_ray.generation.engine import Engine, PromptError
from slm_ray.generation.prompt_files import Prompt, PromptFile, Prompts
from slm_ray.generation.request import Request
from slm_ray.generation.sampling import MAX_SEED, SamplingParams
from slm_ray.sources.addresses import as_text

FIRST_PROMPT = "Once upon a time"
MOST_STORIES, MOST_ROWS = 1000, 256
STORIES_A_ROW = 8
"""In memory at a time for each row: written, being written, and in line."""
MANY_STORIES, PROGRESS_S = 100, 30.0
"""So many tell from time to time how far they are, where they do not appear on a terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Write stories with a trained model and print them."""

    model: str = "models:/tinystories@champion"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION), folder of a checkpoint, or a Llama, Qwen3, GPT-2
    or GPT-Neo that others made: its folder, or hub:OWNER/NAME[@REVISION]."""
    prompt: tuple[str, ...] = ()
    """Beginning of the story, 'Once upon a time' when not given; several give several stories. An empty one lets the
    model begin."""
    prompts: str = ""
    """File of prompts: one a line, or JSON lines with {"prompt": ...}."""
    interactive: bool = False
    """Read prompts from the terminal, one after another, until Ctrl-D."""
    n: int = 1
    """Stories for every prompt; number i of them, from 0, takes seed + i."""
    max_tokens: int = 200
    """Most tokens to write after the prompt, at least 1; a story may end before by itself."""
    temperature: float = 0.7
    """Divides the logits, 0 to 100: higher is more surprising, 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 draws among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability, above 0 to 1."""
    min_p: float = 0.0
    """Draw among tokens at least this times as likely as the likeliest, 0 to 1; 0 draws among all."""
    repetition_penalty: float = 1.0
    """Weighs down tokens that were there already, 0.1 to 10; 1 does not."""
    presence_penalty: float = 0.0
    """Is taken from the logit of every token that was written, -2 to 2."""
    frequency_penalty: float = 0.0
    """Is taken from the logit of a token for each time that it was written, -2 to 2."""
    stop: tuple[str, ...] = ()
    """Texts that end a story before them."""
    seed: int | None = None
    """The same seed writes the same story, here and in the server; a fresh one each time when not given."""
    backend: BackendName = "auto"
    """What executes the model: auto is the fast one where there is one, as in the server."""
    device: DeviceName = "auto"
    """Where it runs: auto is a GPU where torch sees one."""
    rows: int = 8
    """Stories that are written at once, of several."""
    json: bool = False
    """One JSON object a line for each story: prompt, text, finish_reason, prompt_tokens, completion_tokens, seed,
    model."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""

    def __post_init__(self) -> None:
        ways = {"prompt": self.prompt, "prompts": self.prompts, "interactive": self.interactive}
        given = [f"--{name}" for name, value in ways.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} say twice where prompts come from: leave one out")
        for name, most in (("n", MOST_STORIES), ("rows", MOST_ROWS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 1 to {most}")

    def sampling(self, number: int = 0) -> SamplingParams:
        """How story `number` of a prompt is written; without a seed, by a fresh one.

        Raises:
            UserError: an option is out of its range.
        """
        try:
            given = SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                stop=self.stop,
                seed=self.seed,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        seed = random.SystemRandom().randint(0, MAX_SEED) if self.seed is None else self.seed + number
        return dataclasses.replace(given, seed=seed % (MAX_SEED + 1))


class Writer:
    """A model that writes what it is asked for, and the terminal that its stories go to."""

    def __init__(self, config: GenerateConfig, engine: Engine, title: str) -> None:
        self._config, self._engine, self._title = config, engine, title
        self._said_s = time.monotonic()

    def write(self, prompts: Prompts) -> None:
        """Write the stories of all prompts and print them in order, the first that is not finished as it comes.

        Raises:
            PromptError: a prompt cannot be continued, before anything is written.
        """
        for prompt in prompts:
            self._request(prompt, 0)
        for number, (prompt, request) in enumerate(self._asked(prompts)):
            self._say_progress(number, len(prompts) * self._config.n)
            if self._config.json:
                collections.deque(self._chunks(request), maxlen=0)
                print(self._record(prompt.text, request), flush=True)
            else:
                self._print(prompt.text, request, is_first=number == 0)
        if not self._config.json:
            print(flush=True)

    def _asked(self, prompts: Prompts) -> Iterator[tuple[Prompt, Request]]:
        """Each story in order. It is in line at the engine, and so are those after it, up to a bound."""
        bound = STORIES_A_ROW * self._engine.backend.max_slots
        requests = ((prompt, self._request(prompt, number)) for prompt in prompts for number in range(self._config.n))
        asked: collections.deque[tuple[Prompt, Request]] = collections.deque()
        while True:
            for one in itertools.islice(requests, bound - len(asked)):
                self._engine.add(one[1])
                asked.append(one)
            if not asked:
                return
            yield asked.popleft()

    def _request(self, prompt: Prompt, number: int) -> Request:
        config = self._config
        try:
            return self._engine.request(prompt.text, config.sampling(number))
        except PromptError as error:
            where = f"{config.prompts}, line {prompt.line}: " if prompt.line else ""
            raise PromptError(f"{where}{error}") from error

    def _say_progress(self, number: int, stories: int) -> None:
        """Where they go into a file, now and then, how many are written."""
        now = time.monotonic()
        if stories < MANY_STORIES or sys.stdout.isatty() or now - self._said_s < PROGRESS_S:
            return
        self._said_s = now
        print(f"{number:,} of {stories:,} stories are written", file=sys.stderr, flush=True)

    def _chunks(self, request: Request) -> Iterator[str]:
        """Step until a request is finished. Yields its text as it becomes certain."""
        while True:
            chunk = request.take_chunk()
            if chunk is not None:
                yield chunk.text
            if request.is_finished:
                break
            self._engine.step()
        request.completion()

    def _print(self, prompt: str, request: Request, *, is_first: bool) -> None:
        """On a terminal no character of a prompt or a story acts; into a file or a pipe they go as they are."""
        shown = visible_lines if sys.stdout.isatty() else str
        print(shown(prompt if is_first else f"\n\n{prompt}"), end="", flush=True)
        try:
            for text in self._chunks(request):
                print(shown(text), end="", flush=True)
        except KeyboardInterrupt:
            print(flush=True)  # what is said of it begins on a line of its own
            raise

    def _record(self, prompt: str, request: Request) -> str:
        completion = request.completion()
        record = {
            "prompt": prompt,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": len(completion.tokens),
            "seed": request.params.seed,
            "model": self._title,
        }
        return json.dumps(record)  # in ASCII, which every terminal can show


def make_writer(config: GenerateConfig, most_stories: int) -> Writer:
    """Load the model, with a row of its cache for each of so many stories, up to those of the config.

    Raises:
        UserError: no such model, a corrupt one, one whose cache is too large for this machine, no such device, or a
            backend that cannot run it.
    """
    from slm_ray.generation.backend_choice import make_backend  # torch, which `--help` need not wait for
    from slm_ray.model.device import find_device, free_on_gpu, moved
    from slm_ray.tracking.registry import load_model, resolved_model

    device = find_device(config.device, config.backend)
    with resolved_model(config.model, config.tracking_uri) as found:
        model, tokenizer = load_model(found)
    rows = min(config.rows, most_stories)
    advice = "it is no model for this machine" if rows == 1 else "give fewer --rows"
    check_cache(model.config, rows, advice, free_on_gpu(device))
    backend = make_backend(moved(model, device), rows, config.backend)
    return Writer(config, Engine(backend, tokenizer), f"{found.name} {found.version}")


def typed_prompts() -> Iterator[Prompt]:
    """What is typed or sent to standard input, line by line, up to its end.

    Raises:
        UserError: there is no standard input, or it is not text.
    """
    if sys.stdin is None:
        raise UserError("--interactive needs a standard input, and it is closed")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # `input` edits lines with it
    while True:
        try:
            yield Prompt(input("> " if is_terminal else ""))
        except EOFError:
            if is_terminal:
                print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is no {error.encoding} text: {error.reason}") from error


def converse(config: GenerateConfig) -> None:
    """Continue each prompt that is typed; one that cannot be continued is said and costs nothing else."""
    writer = make_writer(config, config.n)
    for prompt in typed_prompts():
        try:
            writer.write([prompt])
        except PromptError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, write, print."""
    set_default_environment()
    about = (GenerateConfig.__doc__ or "").splitlines()[0]
    config = parse(GenerateConfig, argv, prog="generate.py", about=about, default=GenerateConfig())
    prompt, stop = (tuple(map(as_text, texts)) for texts in (config.prompt, config.stop))  # where the locale is ASCII
    config = dataclasses.replace(config, prompt=prompt, stop=stop)
    config.sampling()  # a mistake is said before the model is read
    if config.interactive:
        converse(config)
        return 0
    if config.prompts:
        prompts: Prompts = PromptFile(config.prompts)
    else:
        prompts = [Prompt(text) for text in config.prompt or (FIRST_PROMPT,)]
    make_writer(config, len(prompts) * config.n).write(prompts)
    return 0

"""Check a running endpoint: `python infra/check_endpoint.py http://127.0.0.1:8000`.

In: an address, perhaps an API key. Out: a table of checks, whole and streamed; exit code 0 where all held, 1 where one
failed, 2 where nothing could be asked. It needs this checkout and Python alone, and writes nothing.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("infra.check_endpoint")

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from infra.endpoint_checks import CheckError, Checks, KeyRefusedError, NotAskedError, Prompt
from infra.endpoint_client import Endpoint, LateError, NoAnswerError, UnreachableError, endpoint
from slm_ray.cli.command import command
from slm_ray.errors import UserError, reason, visible

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_FAILED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a check."""

    check: str
    state: Literal["ok", "FAILED", "not asked"]
    detail: str
    seconds: float = 0.0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Ask, judge, and print the table."""
    options = _options(argv)
    prompt = Prompt(text=options.prompt, max_tokens=options.max_tokens, seed=options.seed)
    asked = endpoint(options.url, key=read_key(options.key_file), timeout_s=options.timeout_s)
    results = check(asked, prompt)
    is_ok = all(result.state == "ok" for result in results)
    if options.json:
        checks = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"url": options.url, "is_ok": is_ok, "checks": checks}, indent=1))
    else:
        print(table(results))
    return 0 if is_ok else EXIT_FAILED


def check(asked: Endpoint, prompt: Prompt) -> list[Result]:
    """Run every check; after an answer that is late or none to the first, the others are not asked.

    Raises:
        UserError: nothing answers at the address, or it asks for a key.
    """
    checks = Checks(asked, prompt)
    rows: list[tuple[str, Callable[[], str]]] = [
        ("GET /health", checks.health),
        ("GET /ready", checks.ready),
        ("GET /model", checks.model),
        ("GET /v1/models", checks.models),
        ("POST /generate", checks.story),
        ("  again", checks.same_story),
        ("  streamed", checks.streamed_story),
        ("POST /v1/completions", checks.completion),
        ("  streamed", checks.streamed_completion),
        ("a wrong body", checks.mistake),
    ]
    results, stopped = list[Result](), ""
    for name, one in rows:
        result, stopped = _run(name, one, asked, stopped)
        if name == "GET /health" and result.state != "ok":
            stopped = stopped or "the endpoint is not alive"
        results.append(result)
    return results


def _run(name: str, one: Callable[[], str], asked: Endpoint, stopped: str) -> tuple[Result, str]:
    """One check, and why the next ones are not to be asked."""
    if stopped:
        return Result(check=name, state="not asked", detail=stopped), stopped
    began = time.monotonic()
    try:
        detail = one()
        return Result(check=name, state="ok", detail=visible(detail), seconds=time.monotonic() - began), ""
    except UnreachableError as error:
        raise UserError(f"nothing answers at {asked.scheme}://{asked.host}:{asked.port} ({error})") from error
    except KeyRefusedError as error:
        hint = "it refuses that key" if asked.key else "give it one by --key-file FILE"
        raise UserError(f"the endpoint asks for an API key ({error}): {hint}") from error
    except NotAskedError as error:
        return Result(check=name, state="not asked", detail=str(error)), ""
    except (CheckError, NoAnswerError) as error:
        failed = Result(check=name, state="FAILED", detail=visible(str(error)), seconds=time.monotonic() - began)
        return failed, "an answer before was late" if isinstance(error, LateError) else ""


def table(results: Sequence[Result]) -> str:
    """A line for each check, and a last one for all."""
    lines = [f"{one.check:<22} {one.state:<9} {one.seconds:6.2f} s  {one.detail}" for one in results]
    held = sum(one.state == "ok" for one in results)
    return "\n".join([*lines, f"{held} of {len(results)} checks held"])


def read_key(file: str) -> str:
    """The first key of a file with one a line, as the server reads it; without a file, none.

    Raises:
        UserError: the file cannot be read, or holds none that a header can carry.
    """
    if not file:
        return ""
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the key file {file} cannot be read: {reason(error)}") from error
    key = next((key.strip() for key in text.replace(",", "\n").splitlines() if key.strip()), "")
    if not key.isascii() or not key.isprintable() or not key:
        raise UserError(f"the key file {file} holds no key: expected one a line, of ASCII characters")
    return key


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check_endpoint.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"address of the endpoint (default: {DEFAULT_URL})")
    parser.add_argument("--key-file", default="", help="file with an API key, one a line; the first is sent")
    parser.add_argument("--prompt", default=Prompt.text, help=f"beginning of the story (default: {Prompt.text!r})")
    parser.add_argument("--max-tokens", type=int, default=Prompt.max_tokens, help="most tokens to write (default: 40)")
    parser.add_argument("--seed", type=int, default=Prompt.seed, help="seed of the story (default: 1)")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="longest time for one answer (default: 60)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(argv)
    if options.max_tokens < 1:
        raise UserError(f"--max-tokens ({options.max_tokens}) must be at least 1")
    if not 0 < options.timeout_s < float("inf"):
        raise UserError(f"--timeout-s ({options.timeout_s}) must be above 0")
    return options

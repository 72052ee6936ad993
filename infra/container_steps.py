"""What `compose.yaml` does before and after the project's own commands: keys are made, and a first story is asked for.

In: a folder for the keys, or the address of an endpoint. Out: files that are there from then on; a story on standard
output. Needs Python's standard library only.

    python infra/container_steps.py keys /keys
    python infra/container_steps.py story http://serve:8000 /keys/api-keys
"""

import argparse
import http.client
import json
import os
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

FILES = ("api-keys", "ray-token")
"""One key for the endpoint, as SLM_API_KEYS reads it; the token of a Ray cluster, as RAY_AUTH_TOKEN_PATH reads it."""
PROMPT = "Once upon a time"
TIMEOUT_S = 120


class StepError(Exception):
    """The step failed; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do one step. Returns 0, or 2 with one line on why not."""
    parser = argparse.ArgumentParser(prog="container_steps.py", description=(__doc__ or "").splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("keys", help="make keys where there are none yet").add_argument("folder", type=Path)
    story = steps.add_parser("story", help="ask an endpoint for a story")
    story.add_argument("url")
    story.add_argument("keys", type=Path, help="file whose first line is a key of the endpoint")
    options = parser.parse_args(argv)
    try:
        if options.step == "keys":
            make_keys(options.folder)
        else:
            print(first_story(options.url, options.keys), flush=True)
    except (StepError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def make_keys(folder: Path) -> None:
    """Write each file that is not there yet, for its owner alone; one that is there stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        path = folder / name
        if path.exists():
            continue
        half = path.with_suffix(".new")
        half.unlink(missing_ok=True)
        with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
            file.write(f"{secrets.token_hex(32)}\n")
        half.replace(path)


def first_story(url: str, keys: Path) -> str:
    """A story of the endpoint, and how to ask for the next one.

    Raises:
        StepError: the file holds no key, or the endpoint gives no story.
    """
    lines = keys.read_text(encoding="utf-8").split()
    if not lines:
        raise StepError(f"{keys} holds no key")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {lines[0]}"}
    body = json.dumps({"prompt": PROMPT, "max_tokens": 200, "temperature": 0.7, "top_k": 50, "seed": 1}).encode()
    if not url.startswith(("http://", "https://")):
        raise StepError(f"{url} is no address of an endpoint: give one like http://127.0.0.1:8000")
    request = urllib.request.Request(f"{url.rstrip('/')}/generate", body, headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            story = json.load(answer)["story"]
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise StepError(f"{url} gave no story: {error}") from error
    return f"\n{story}\n\nthe page: http://127.0.0.1:8000/, and the key that it asks for is in {keys}"


if __name__ == "__main__":
    raise SystemExit(main())

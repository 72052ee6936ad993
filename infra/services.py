"""What stands around the commands: ports, Ray, the store of runs and models, the data set, the hub.

In: the environment, files of the working folder, sockets of this machine, and one question to the hub. Out: a `Finding`
each. Nothing is started; a tracking server or a Ray cluster elsewhere is named and not asked.
"""

import errno
import json
import os
import re
import sqlite3
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from infra.machine import BY_HAND, Finding, version_of
from slm_ray.cli.ports import check_port
from slm_ray.errors import UserError, one_line, visible, without_secrets
from slm_ray.hub_reference import ANSWER_TIMEOUT_S

HOST = "127.0.0.1"
PORTS = {
    8000: ("serve/app.py", "serve/app.py --port 8001, or stop what listens there"),
    8265: ("Ray's dashboard, to which `ray job submit` goes", "a Ray runs here already, or take --dashboard-port"),
    6379: ("ray start --head", "a Ray or a Redis runs here already, or take --port"),
}
MODEL, ALIAS = "tinystories", "champion"
DATA = "data/tinystories"
HUB, DATA_SET = "https://huggingface.co", "roneneldan/TinyStories"
HUB_TIMEOUT_S = min(2.0, ANSWER_TIMEOUT_S)
_SQLITE = "sqlite:///"


def ports() -> Iterator[Finding]:
    """Whether those that the commands take by themselves are free on loopback."""
    for port, (use, otherwise) in PORTS.items():
        name = f"port {port}"
        try:
            check_port(HOST, port)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            found = "in use" if is_taken else f"not to be had ({error.strerror or error})"
            yield Finding(name=name, state="note", found=found, advice=f"for {use}: {otherwise}")
        else:
            yield Finding(name=name, state="ok", found="free", advice=f"for {use}")


def ray() -> Finding:
    """Which one the commands will use."""
    version = version_of("ray")
    if version is None:
        advice = f"train.py, sweep.py and app.py do not start: {BY_HAND.format('train,serve')}"
        return Finding(name="Ray", state="note", found="not installed", advice=advice)
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        return Finding(
            name="Ray", state="ok", found=f"{version}, no RAY_ADDRESS", advice="commands start one of their own"
        )
    found = f"{version}, RAY_ADDRESS={visible(without_secrets(address))}"
    return Finding(
        name="Ray", state="note", found=found, advice="commands go there (not asked); unset it for a local Ray"
    )


def ray_token() -> Finding:
    """Whether a cluster of this user's is closed, and the token its owner's alone."""
    variables = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    if variables:
        return Finding(
            name="Ray token", state="ok", found=f"in {variables[0]}", advice="set RAY_AUTH_MODE=token beside it"
        )
    try:
        mode = (Path.home() / ".ray" / "auth_token").stat().st_mode
    except (OSError, RuntimeError):
        advice = "a local Ray makes its own; before `ray start`: ray get-auth-token --generate"
        return Finding(name="Ray token", state="ok", found="none", advice=advice)
    if stat.S_IMODE(mode) & 0o077:
        found = f"~/.ray/auth_token, mode {stat.S_IMODE(mode):o}"
        return Finding(
            name="Ray token", state="note", found=found, advice="others may read it: chmod 600 ~/.ray/auth_token"
        )
    return Finding(
        name="Ray token", state="ok", found="~/.ray/auth_token", advice="RAY_AUTH_MODE=token before `ray start`"
    )


def store_address() -> str:
    """Where runs and models are, as the commands read it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"


def champion() -> str | None:
    """The version that is served unless another is named; None where the store has none.

    Raises:
        UserError: the store is not on this disk, or cannot be read.
    """
    address = store_address()
    if not address.startswith(_SQLITE):
        raise UserError(f"{address} is not on this disk, and is not asked")
    file = Path(address.removeprefix(_SQLITE).partition("?")[0]).absolute()
    try:
        if not file.exists():
            return None
        store = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=1)
        try:
            query = "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?"
            row = store.execute(query, (MODEL, ALIAS)).fetchone()
        finally:
            store.close()
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error
    return None if row is None else str(row[0])


def store() -> Finding:
    """Runs and models, and whether there is one to serve."""
    if version_of("mlflow") is None:
        advice = f"no run is recorded and no model registered: {BY_HAND.format('train')}"
        return Finding(name="MLflow store", state="note", found="MLflow is not installed", advice=advice)
    address = visible(without_secrets(store_address()))
    try:
        version = champion()
    except UserError as error:
        if not address.startswith(_SQLITE):
            return Finding(name="MLflow store", state="note", found=address, advice="commands go there (not asked)")
        advice = "see to it that it is this project's, or move it away"
        return Finding(name="MLflow store", state="note", found=visible(str(error)), advice=advice)
    if version is None:
        found, advice = f"{address}, no {MODEL}@{ALIAS} in it", "nothing to serve yet: python tune/sweep.py makes it"
        return Finding(name="MLflow store", state="ok", found=found, advice=advice)
    found = f"{address}, {MODEL}@{ALIAS} is version {version}"
    return Finding(name="MLflow store", state="ok", found=found, advice="python serve/app.py serves it")


def data_set() -> Finding:
    """What train.py and sweep.py read unless told otherwise."""
    manifest = Path(DATA) / "manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        found = f"{DATA}, {int(content['splits']['train']['rows']):,} stories"
    except FileNotFoundError:
        advice = "python pipelines/prepare.py --runner DirectRunner"
        return Finding(name="data set", state="ok", found=f"none in {DATA}", advice=f"before training: {advice}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "prepare.py --force makes it anew; it replaces nothing that is not a data set's"
        return Finding(
            name="data set", state="note", found=f"{manifest} cannot be read ({one_line(error)})", advice=advice
        )
    return Finding(name="data set", state="ok", found=found, advice="python slm_ray/train.py")


def hub(is_offline: bool) -> Finding:
    """Whether the hub answers for TinyStories: one HEAD, which ends within two seconds."""
    sample = "prepare.py takes the sample corpus; name files with --source"
    if is_offline:
        return Finding(
            name="hub", state="ok", found="not asked (--offline)", advice=f"where it does not answer, {sample}"
        )
    if re.fullmatch(r"1|on|yes|true", os.environ.get("HF_HUB_OFFLINE", ""), re.IGNORECASE):
        return Finding(name="hub", state="note", found="HF_HUB_OFFLINE is set", advice=sample)
    address = os.environ.get("HF_ENDPOINT") or HUB
    answer = list[str | int]()
    asking = threading.Thread(target=lambda: answer.append(_ask(address)), daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)  # looking up a name has no time limit of its own
    said = answer[0] if answer else f"no answer in {HUB_TIMEOUT_S:g} s"
    if isinstance(said, int) and said < 400:
        return Finding(
            name="hub", state="ok", found=f"{DATA_SET} is there", advice="prepare.py takes 20,000 stories of it"
        )
    found = f"{visible(without_secrets(address))}: {said if isinstance(said, str) else f'answered {said}'}"
    return Finding(name="hub", state="note", found=found, advice=sample)


def _ask(address: str) -> str | int:
    request = urllib.request.Request(f"{address.rstrip('/')}/api/datasets/{DATA_SET}", method="HEAD")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return visible(str(getattr(reason, "strerror", None) or one_line(error)))

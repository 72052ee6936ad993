"""Which Ray a command runs on.

In: RAY_ADDRESS. Out: this process connected to the cluster it names (a submitted job has it set), or to a local Ray of
its own. A cluster that merely runs on this machine is not joined: its address may be left over from one that was
killed, and Ray ends a process that asks a dead one, after a minute and without a word to mend it by.
"""

import logging
import os
import socket
from typing import Any

import ray

from slm_ray.errors import UserError

LOCAL = "local"
ANSWER_TIMEOUT_S = 5.0


def connect(**local_options: Any) -> bool:
    """Connect once a process. Returns whether the Ray was started here, and so ends with this process.

    `local_options` go to `ray.init` where a local Ray is started.

    Raises:
        UserError: RAY_ADDRESS names no cluster that answers.
    """
    address = os.environ.get("RAY_ADDRESS") or LOCAL
    if ray.is_initialized():
        return address == LOCAL
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        ray.init(LOCAL, **quiet, **local_options)
        return True
    _check_answers(address)
    try:
        ray.init(address, **quiet)
    except (ConnectionError, ValueError) as error:
        raise _no_answer(address) from error
    return False


def _check_answers(address: str) -> None:
    """Knock at HOST:PORT; any other form is left to Ray."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise _no_answer(address) from error


def _no_answer(address: str) -> UserError:
    return UserError(f"no Ray cluster answers at RAY_ADDRESS={address}: unset it to start a local one")

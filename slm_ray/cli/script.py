"""How a module of this project is run as a script.

In: the module's name. Out: its `main()`, with the environment that its imports need to find. Nothing heavy is imported
here, so that Ctrl-C ends a command plainly from its first moment on.
"""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from slm_ray.cli.signals import end_on_interrupt
from slm_ray.limits import allowed_cores, core_count

DEFAULT_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",  # of ONNX Runtime, which begins when it is imported
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would take Ctrl-C for the end of the sweep, not of the command
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables, which verbose=0 does not turn off
    "RAY_worker_maximum_startup_concurrency": "8",  # a trial starts a dozen small actors on two cores
}
"""Environment variables of every command, unless the user set them."""


def run(module: str, *, first: Callable[[], object] = lambda: None) -> NoReturn:
    """Import a module under its own name and run it: classes pickled as `__main__`'s are strangers to the workers.

    `first` is called before; what it imports, Ctrl-C ends as plainly.

    The script has put its checkout first on the path, in place of its own folder, where `slm_ray/model` would be found
    as `model`. The processes that it starts get the same.
    """
    end_on_interrupt()
    open_standard_streams()
    set_default_environment()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    gc.disable()  # of what an import makes nearly all stays, and is looked through again and again
    first()
    command = importlib.import_module(module)
    gc.freeze()  # nor is it looked through later: a fork keeps sharing that memory
    gc.enable()
    raise SystemExit(command.main())


def open_standard_streams() -> None:
    """Let a stream that is closed, as under some schedulers (`2>&-`), lead nowhere: its number would go to a file."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        with contextlib.suppress(OSError):
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def set_default_environment() -> None:
    """Entry points send no telemetry and leave Ray's own tables and start-up warnings out; what the user set stays.

    To be called before Ray and ONNX Runtime are imported: where no cluster is named, it also keeps the local one on
    loopback. A user without a name gets the home that Docker gives to one, without which Ray and MLflow cannot be
    imported. Threads are counted by a container's quota.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"
    if (os.environ.get("RAY_ADDRESS") or "local") == "local":  # as `cluster.connect` reads it
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # 1, Linux's default, listens everywhere
    if (count := core_count()) < allowed_cores():  # torch and numpy count the cores of the machine by themselves
        os.environ.setdefault("OMP_NUM_THREADS", str(count))
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

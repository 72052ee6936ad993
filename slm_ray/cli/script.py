"""How a module of this project is run as a script.

In: the module's name. Out: its `main()`, with the environment that its imports need to find. Nothing heavy is imported
here, so that Ctrl-C ends a command plainly from its first moment on.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import NoReturn


def run(module: str) -> NoReturn:
    """Import a module under its own name and run it: classes pickled as `__main__`'s are strangers to the workers."""
    use_checkout(Path(sys.argv[0]).resolve().parents[1])
    importlib.import_module("slm_ray.cli.signals").end_on_interrupt()
    set_default_environment()
    raise SystemExit(importlib.import_module(module).main())


def use_checkout(root: Path) -> None:
    """Import from the script's checkout, here and in the processes started from here, whatever else is installed.

    Python puts the script's own folder first, where `slm_ray/model` would be found as `model`; Ray hands that on.
    """
    sys.path[0] = str(root)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    if Path(__file__).resolve().parents[2] != root:  # this file is of another checkout, the installed one
        for name in [name for name in sys.modules if name.split(".")[0] == "slm_ray"]:
            del sys.modules[name]


def set_default_environment() -> None:
    """Entry points send no telemetry and leave Ray's own tables and start-up warnings out; what the user set stays.

    To be called before Ray is imported: where no cluster is named, it also keeps the local one on loopback.
    """
    if (os.environ.get("RAY_ADDRESS") or "local") == "local":  # as `cluster.connect` reads it
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # 1, Linux's default, listens everywhere
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would take Ctrl-C for the end of the sweep, not of the command
        "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables, which verbose=0 does not turn off
        "RAY_worker_maximum_startup_concurrency": "8",  # a trial starts a dozen small actors on two cores
    }.items():
        os.environ.setdefault(name, value)

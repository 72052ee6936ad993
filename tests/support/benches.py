"""Modules of `tests/bench`, which are scripts in folders of their own and no packages.

In: a file's name. Out: the module, as the scripts beside it import it.
"""

import importlib.util
import sys
from types import ModuleType

from tests.support.paths import ROOT


def learning_bench(name: str) -> ModuleType:
    """A module of `tests/bench/learning`; those that it imports have to be asked for before it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "bench" / "learning" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses and the next ones look there
    spec.loader.exec_module(module)
    return module

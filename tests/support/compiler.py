"""For tests that compile: where there is no C++ compiler, they are skipped with a word."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest

HAS_COMPILER = (
    shutil.which(os.environ.get("CXX", "g++")) is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()
)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler, or no headers of Python for it")

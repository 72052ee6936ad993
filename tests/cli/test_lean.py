"""A package can be imported as if some others were not installed."""

import subprocess
import sys

import pytest

from slm_ray.cli import lean


def test_what_is_left_out_is_there_again_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with lean.without("colorsys"), pytest.raises(ModuleNotFoundError, match="colorsys is left out here"):
        import colorsys
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


def test_what_was_imported_before_stays():
    with lean.without("json"):
        import json
    assert json.dumps(1) == "1"


def test_beam_and_arrow_do_without_what_prepare_leaves_out():
    script = """
from slm_ray.cli import lean
names = ("boto3", "pandas", "pymongo", "requests")
with lean.without(*names):
    import apache_beam, pyarrow
    pyarrow.array([0])
import sys
assert not set(names) & set(sys.modules), set(names) & set(sys.modules)
assert pyarrow.table({"a": [1]}).to_pandas().shape == (1, 1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

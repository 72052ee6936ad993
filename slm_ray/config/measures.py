"""Names of what is measured, and how: known without torch, for which `--help` need not wait.

In: options of `evaluate.py`. Out: what `evaluation/measurement.py` does.
"""

from typing import Literal

Measure = Literal["stories", "windows"]
Split = Literal["train", "validation", "test"]

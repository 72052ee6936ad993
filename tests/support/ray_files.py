"""Which test files start a Ray: those that say `pytestmark = pytest.mark.ray`.

Several Rays at once on one machine confuse each other, so these files are kept in one process. The scheduler that does
it sees names of files only, before any is imported.
"""

import ast
from functools import cache
from pathlib import Path


@cache
def starts_ray(path: Path) -> bool:
    """Whether a test file bears the marker, alone or in a list of several."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets):
            return any(ast.unparse(part) == "pytest.mark.ray" for part in ast.walk(node.value))
    return False

"""What a marker lists is believed only where it is a file of its own folder.

In: the content of a marker that a stranger may have made. Out: names with digests. `verification.py` reads with it.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any


def listed_files(marker: Mapping[str, Any], needed: tuple[str, ...]) -> dict[str, str]:
    """The names of a marker with their digests.

    Raises:
        ValueError: it lists anything but files by their digests, one of `needed` is not there, or a name leads out of
            the folder.
    """
    files = marker.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError("it does not list files with their digests")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
            raise ValueError(f"it lists {name!r}, which leads out of the folder")
    missing = [name for name in needed if name not in files]
    if missing:
        raise ValueError(f"it does not list {', '.join(missing)}")
    return files

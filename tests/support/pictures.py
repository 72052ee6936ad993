"""Pictures as a test sees them: decoded, and with the axes that they were drawn on."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image


def assert_drawn(picture: bytes | Path, size: tuple[int, int]) -> None:
    """A PNG that decodes whole, has this size in pixels, and shows something on its ground."""
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        assert image.size == size
        colours = Counter(image.convert("RGB").get_flattened_data())
    (_, ground), *_ = colours.most_common(1)
    assert len(colours) > 10
    assert 0.005 < 1 - ground / sum(colours.values()) < 0.9


def record_axes(monkeypatch: pytest.MonkeyPatch) -> list[list[Axes]]:
    """The axes of every figure that is saved from now on, as a list that grows."""
    saved: list[list[Axes]] = []
    savefig = Figure.savefig

    def record(self: Figure, *rest: Any, **more: Any) -> None:
        saved.append(list(self.axes))
        savefig(self, *rest, **more)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved

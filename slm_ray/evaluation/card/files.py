"""The folder of a card: card.json, card.md, card.html, loss.png.

In: a card. Out: files; and whether those that lie beside a card.json are the ones that belong to it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from slm_ray.errors import UserError
from slm_ray.evaluation.card import page
from slm_ray.evaluation.card.content import Card
from slm_ray.evaluation.card.signature import SIGNATURE
from slm_ray.evaluation.card.verification import CARD, Difference
from slm_ray.evaluation.output_places import check_folder

MARKDOWN, HTML, PICTURE = "card.md", "card.html", "loss.png"
_OURS = frozenset((CARD, MARKDOWN, HTML, PICTURE, SIGNATURE))
_DRAWN = re.compile(r'src="data:image/png;base64,[A-Za-z0-9+/=]*"')


def check_output(folder: str) -> Path:
    """Where a card may be written: a new folder, an empty one, or one with nothing but an older card.

    Raises:
        UserError: it is a file, holds something else, or cannot be written to.
    """
    place = Path(folder)
    try:
        others = {path.name for path in place.iterdir()} - _OURS if place.exists() else set()
    except OSError as error:
        raise UserError(f"cannot write a card to {folder}: {error.strerror or error}") from error
    check_folder(folder)
    if others:
        raise UserError(f"{folder} holds {min(others)}: name a new folder for the card")
    return place


def write_card(folder: Path, card: Card) -> None:
    """Write all files of a card; card.json comes last, and the signature of an older card goes.

    Raises:
        UserError: they cannot be written.
    """
    contents = {
        MARKDOWN: page.markdown(card).encode("utf-8"),
        HTML: page.html(card).encode("utf-8"),
        PICTURE: page.picture(card),
        CARD: (json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SIGNATURE).unlink(missing_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write a card to {folder}: {error.strerror or error}") from error


def altered_pages(path: str, card: Card) -> Iterator[Difference]:
    """Pages beside a card that do not say what the card says; how the picture is drawn is left out.

    Raises:
        UserError: one of them cannot be read.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    for name, expected in ((MARKDOWN, page.markdown(card)), (HTML, page.html(card))):
        try:
            found = (folder / name).read_bytes().decode("utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot read {folder / name}: {error.strerror or error}") from error
        if _DRAWN.sub("", found) != _DRAWN.sub("", expected):
            yield Difference(name, "another text", "the text of the numbers in card.json")

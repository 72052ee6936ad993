"""Building blocks of the report page: escaped text, tables, figures, stories, and the style sheet.

In: values and text of any kind. Out: HTML; nothing here lets text act as markup. Used by `report`. The page loads
nothing from outside, fits a phone, follows the reader's light or dark mode, and prints.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence

_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that act on a terminal or turn the reading direction around, and show nothing."""
_NUMBER = re.compile(r"[0-9][0-9,.]*%?|-")

STYLE = """
:root { --page: #fcfcfb; --ink: #23283a; --soft: #636a7c; --line: #dfe2e8; --card: #f1f3f6;
  --accent: #b4540f; --odd: #fbe3cd; --even: #d9e7f5; --end: #dcefdc }
@media screen and (prefers-color-scheme: dark) { :root { --page: #15171c; --ink: #e4e6ec; --soft: #9aa2b4;
  --line: #343944; --card: #1f232b; --accent: #f0a060; color-scheme: dark;
  --odd: #57371b; --even: #22405f; --end: #28492b } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 64rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif }
header p, .note { color: var(--soft) } .note { font-size: .92rem; max-width: 46rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem } p { margin: .5rem 0; max-width: 46rem }
code { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; unicode-bidi: isolate }
.long { overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); gap: .7rem; margin: 1.4rem 0 }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums }
.tiles span { color: var(--soft); font-size: .85rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem }
figure { margin: .8rem 0 0; break-inside: avoid }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; mix-blend-mode: multiply }
@media screen and (prefers-color-scheme: dark) {
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen } }
.answer { border-left: .25rem solid var(--accent); padding: .2rem 0 .2rem .9rem; margin: 1rem 0 }
.wide { overflow-x: auto; margin: .8rem 0 } table { border-collapse: collapse; font-size: .93rem }
th, td { padding: .3rem 1.3rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600; font-size: .86rem; vertical-align: bottom }
td { overflow-wrap: break-word; min-width: 3.2rem }
td:last-child { max-width: 34rem } th:last-child, td:last-child { padding-right: 0 }
.n { text-align: right; font-variant-numeric: tabular-nums } td.n { white-space: nowrap }
.examples th:first-child { min-width: 11rem }
@media (max-width: 40rem) { table { font-size: .85rem } th, td { padding-right: .8rem }
  td { min-width: 0 } .examples th:first-child { min-width: 0 } }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2.5rem }
.story { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.95; max-width: none; margin: .4rem 0 }
.story span { padding: .14em 0; border-radius: .2em; -webkit-print-color-adjust: exact; print-color-adjust: exact;
  -webkit-box-decoration-break: clone; box-decoration-break: clone }
.story span:nth-child(odd) { background: var(--odd) } .story span:nth-child(even) { background: var(--even) }
.story span.end { background: var(--end); font-size: .8em; padding: .14em .4em; margin-left: .3em }
.story span:hover { outline: 2px solid var(--accent) }
summary { cursor: pointer; color: var(--soft); font-size: .88rem } details code { color: var(--soft) }
@media print { body { max-width: none; padding: 0; font-size: 10pt } h2, h3 { break-after: avoid }
  table, .tiles, .story { break-inside: avoid } }
""".strip()


def visible(text: str) -> str:
    r"""Text whose hidden characters are written out, as `\x1b` or `\u202e`, and so do nothing."""
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def text(value: object) -> str:
    """Any value as text between tags or in an attribute; whole numbers get thousands apart."""
    shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return html.escape(visible(shown))


class Code(str):
    """Text in a fixed-width font: an id, a digest."""


def code(value: str) -> str:
    """In a fixed-width font; what is long, as a digest, may be broken anywhere."""
    return f'<code class="long">{text(value)}</code>' if len(value) > 40 else f"<code>{text(value)}</code>"


def document(title: str, body: Iterable[str]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Whole numbers, and text that begins like one, stand to the right; a cell of `Code` in a fixed-width font."""
    numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(head))]
    heads = "".join(_cell("th", name, is_number) for name, is_number in zip(head, numeric, strict=True))
    lines = "\n".join(
        "<tr>" + "".join(_cell("td", cell, is_number) for cell, is_number in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def figure(content: bytes, says: str, caption: str = "") -> str:
    """A PNG inside the page; `says` is its text for those who cannot see it."""
    data = base64.b64encode(content).decode("ascii")
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{text(says)}" src="data:image/png;base64,{data}">{below}</figure>'


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """The numbers of first interest, each over its name."""
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{text(value)}</b><span>{text(name)}</span></div>" for value, name in pairs)
        + "</div>"
    )


def story(pieces: Sequence[tuple[int, str]], eos_id: int, left_out: int) -> str:
    """A story as tokens, given as (id, text): each in its own shade, its id on hover and in a list to unfold."""
    spans = "".join(
        f'<span{_end_class(token, eos_id)} title="token {token}">{html.escape(_lines_kept(piece))}</span>'
        for token, piece in pieces
    )
    more = f" … and {left_out:,} more tokens" if left_out else ""
    ids = " ".join(str(token) for token, _ in pieces)
    return (
        f'<p class="story" dir="auto">{spans}{more}</p>\n'
        f'<details><summary>token ids</summary><code class="long">{ids}</code></details>'
    )


def _cell(tag: str, value: object, is_number: bool) -> str:
    shown = code(value) if isinstance(value, Code) else text(value)
    return f'<{tag} class="n">{shown}</{tag}>' if is_number else f"<{tag}>{shown}</{tag}>"


def _is_number(value: object) -> bool:
    """Also of numbers that are already text, as `4.04` or `93.2%`, and `-` for none; ids and digests are `Code`."""
    return isinstance(value, int) or (type(value) is str and _NUMBER.fullmatch(value) is not None)


def _end_class(token: int, eos_id: int) -> str:
    return ' class="end"' if token == eos_id else ""


def _lines_kept(piece: str) -> str:
    """Line breaks are part of the story and stay."""
    return "\n".join(visible(line) for line in piece.split("\n"))

"""CSV and TSV as they come: quoted line ends, damaged rows, odd bytes."""

import csv
import io

import pytest

from slm_ray.errors import UserError
from slm_ray.sources import delimited
from slm_ray.sources.delimited import Delimited


def rows(
    content: bytes, column: str = "text", delimiter: str = ",", size: int = 7
) -> list[tuple[bytes | None, str | None]]:
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    form = Delimited(column, name="TSV" if delimiter == "\t" else "CSV", delimiter=delimiter)
    return list(form.rows("a.csv", chunks, at_start=True))


def good(*texts: bytes) -> list[tuple[bytes, None]]:
    return [(text, None) for text in texts]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text\nOne.\nTwo.\n", good(b"One.", b"Two.")),
        (b"id,text\r\n1,One.\r\n\r\n2,Two.", good(b"One.", b"Two.")),
        (b'text,id\n"One,\n""said""\r\nhe.",1\n', good(b'One,\n"said"\r\nhe.')),
        (b"\xef\xbb\xbftext,id\nOne.,1\n", good(b"One.")),
        (b'text\n""\n   \n', good(b"", b"   ")),
        (b"text,id\nN\x00L,1\n\xff\xed\xa0\x80,2\n", good(b"N\x00L", b"\xff\xed\xa0\x80")),
        (b"id,text\n1\n2,b\n3,c,d\n", [(b"1", "bad_csv"), (b"b", None), (b"3,c,d", "bad_csv")]),
        (b"text\n", []),
    ],
)
def test_every_row_is_a_story_or_has_a_problem(content, expected):
    assert rows(content) == expected


def test_tabs_part_tsv():
    assert rows(b"id\ttext\n1\tOne, two.\n", delimiter="\t") == good(b"One, two.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,body\n1,b\n", "a.csv has no column 'text'; it has 'id', 'body': name the right one with --text-column"),
        (b'text\n"One.\nTwo.\n', "a.csv is not CSV as it should be, near line 3: unexpected end of data"),
        (b'text\n"He said "no" to me."\n', "near line 2: ',' expected after '\"' (a field that begins with a quote"),
    ],
)
def test_a_file_whose_rows_cannot_be_told_apart_is_refused(content, message):
    with pytest.raises(UserError) as caught:
        rows(content)
    assert message in str(caught.value)


def test_a_quote_that_nobody_closed_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(delimited, "LONGEST_FIELD_CHARS", 1000)
    taken = 0

    def chunks():
        nonlocal taken
        yield b'text\n"begun '
        while True:
            taken += 1
            yield b"and so on\n" * 10

    with pytest.raises(UserError, match="field larger than field limit"):
        list(Delimited("text", name="CSV", delimiter=",").rows("a.csv", chunks(), at_start=True))
    assert taken < 20


def test_a_field_of_fifty_megabytes_is_a_row():
    story = "word " * 10_000_000
    written = io.StringIO()
    csv.writer(written).writerows([["text"], [story], ["Short."]])
    found = rows(written.getvalue().encode(), size=1 << 20)
    assert [(len(text or b""), problem) for text, problem in found] == [(50_000_000, None), (6, None)]


def test_between_tabs_a_quote_swallows_nothing():
    content = b'text\tn\n"Hello, said Tom.\t1\nHe left."\t2\n'
    with pytest.raises(UserError, match=r"a\.csv has a field over several lines that ends in line 3, and TSV has none"):
        rows(content, delimiter="\t")


def test_a_quote_that_ends_inside_a_field_is_one_clear_line_that_names_the_format():
    with pytest.raises(UserError, match=r"is not TSV as it should be, near line 2: .* or write JSONL"):
        rows(b'text\tn\n"Hello," said Tom.\t1\n', delimiter="\t")


def test_two_columns_of_the_name_are_refused():
    with pytest.raises(UserError, match="has 2 columns 'text': rename all but one"):
        rows(b"text,text\na,b\n")

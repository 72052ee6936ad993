"""Where stories of plain text begin and end, whatever the chunks it comes in."""

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.errors import UserError
from slm_ray.sources import plain_text
from slm_ray.sources.plain_text import SplitOptions, scan
from slm_ray.sources.plan import plan_source
from slm_ray.sources.splitters import BOM, make_splitter, read_stories
from tests.support.paths import SHARED_DATA

WIKITEXT = SHARED_DATA / "wikitext-2" / "validation.txt"
MODES = [mode for mode in plain_text.CUTS if mode != "auto"]

parts = st.sampled_from(
    [
        "<|endoftext|>",
        "<|endof",
        "\n",
        "\r\n",
        " ",
        "\t",
        "a",
        "One. ",
        "é",
        "\udcff",
        " = Title = \n",
        "\n = = Part = = \n",
    ]
)
texts = st.lists(parts, max_size=40).map(lambda found: "".join(found).encode("utf-8", "surrogateescape"))


def chunked(text: bytes, size: int) -> list[bytes]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def stories(chunks: list[bytes], mode: str, piece_chars: int = 50, *, at_start: bool = True) -> list[bytes]:
    return list(read_stories(chunks, make_splitter(mode, piece_chars, at_start=at_start)))


@given(text=texts, mode=st.sampled_from(MODES), size=st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_the_chunks_do_not_matter(text, mode, size):
    assert stories(chunked(text, size), mode) == stories([text], mode)
    count = scan(chunked(text, size), SplitOptions(mode=mode, piece_chars=50), 1)[1]
    assert count.n_rows == len(stories([text], mode))


@given(text=texts, mode=st.sampled_from(MODES), step=st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_reading_can_begin_at_any_border(text, mode, step):
    whole = stories([text], mode)
    borders = [*scan([text], SplitOptions(mode=mode, piece_chars=50), step)[1].borders, len(text)]
    splitter = make_splitter(mode, 50, at_start=False)
    found = []
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        inside = text[start : end + splitter.lookahead_bytes]
        found += stories([inside], mode, at_start=False)[: min(step, len(whole) - number * step)]
    assert found == whole


@given(text=texts)
def test_separated_stories_are_those_of_a_plain_split(text):
    for mode, pattern in (("end-mark", rb"<\|endoftext\|>"), ("blank-lines", rb"\r?\n[ \t]*\r?\n\s*")):
        expected = re.split(pattern, text)
        if len(expected) > 1 and not expected[0]:
            del expected[0]
        if expected and not expected[-1].strip():
            del expected[-1]
        assert stories([text], mode) == expected


@given(text=st.text("ab .\n!é\U0001f600", max_size=600), chars=st.integers(50, 120))
@settings(deadline=None)
def test_pieces_lose_nothing_and_are_about_equal(text, chars):
    found = [piece.decode() for piece in stories([text.encode()], "pieces", chars)]
    assert text.startswith("".join(found))
    assert not text[len("".join(found)) :].strip()
    assert all(chars - chars // 4 <= len(piece) <= chars + chars // 4 for piece in found[:-1])
    assert all(len(piece) <= chars + chars // 2 for piece in found)


def test_a_piece_ends_at_the_best_border_near_its_length():
    words, sentence = "word " * 30, "It ended. "
    assert stories([("word " * 18 + sentence + words).encode()], "pieces", 100)[0] == b"word " * 18 + b"It ended. "
    assert stories([("word " * 18 + sentence + "\n\n" + words).encode()], "pieces", 100)[0].endswith(b". \n\n")
    assert stories([(words * 2).encode()], "pieces", 102)[0] == b"word " * 20
    assert [len(piece) for piece in stories([b"x" * 320], "pieces", 100)] == [100, 100, 120]


ARTICLES = b" \n = One = \n \n Text of one . \n \n = = Part = = \n \n More . \n \n = Two = \n \n Text of two . \n"


def test_articles_begin_at_headings_of_the_first_level():
    assert [story.split()[:3] for story in stories([ARTICLES], "articles")] == [
        [b"=", b"One", b"="],
        [b"=", b"Two", b"="],
    ]
    with_preface = stories([b"Preface\n" + ARTICLES], "articles")
    assert with_preface[0].strip() == b"Preface"
    assert len(with_preface) == 3


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (ARTICLES, "articles"),
        (BOM + ARTICLES.lstrip(), "articles"),
        (ARTICLES.replace(b"\n", b"\r\n"), "articles"),
        (b"= One =\nText\n= Two =\nText\n", "articles"),
        (ARTICLES.replace(b" = Two = ", b" = = Two = = "), "blank-lines"),
        (ARTICLES + b"<|endoftext|>", "end-mark"),
        (b"A = B = C\n\n = 3 @,@ 000 \n", "blank-lines"),
        (b"One.\n\nTwo.", "blank-lines"),
    ],
)
def test_auto_takes_what_fits_the_text(text, mode):
    for size in (1, 7, len(text)):
        assert scan(chunked(text, size), SplitOptions(), 4)[0] == mode


def test_a_byte_order_mark_is_no_part_of_a_story():
    for mode in MODES:
        assert stories([BOM + b"One."], mode) == [b"One."]
    assert stories([BOM + b"<|endoftext|>One."], "end-mark") == [b"One."]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            {"mode": "chapters"},
            r"cut_text \(chapters\) must be one of auto, end-mark, blank-lines, lines, articles, pieces",
        ),
        ({"mode": "pieces", "piece_chars": 3}, r"piece_chars \(3\) must be from 50 to 1,000,000"),
    ],
)
def test_a_wrong_way_to_cut_is_refused(cut, message):
    with pytest.raises(UserError, match=message):
        SplitOptions(**cut)


@pytest.mark.skipif(not WIKITEXT.exists(), reason="needs ../shared/data/wikitext-2/validation.txt")
def test_wikitext_is_cut_into_its_articles():
    chunks = chunked(WIKITEXT.read_bytes(), 1 << 20)
    mode, count = scan(chunks, SplitOptions(), 1)
    found = [story.decode() for story in stories(chunks, "articles")]
    assert (mode, count.n_rows, len(found)) == ("articles", 60, 60)
    assert found[0].startswith(" = Homarus gammarus = \n")
    assert all(len(re.findall(r"^ = [^=\n]+ = $", story, re.MULTILINE)) == 1 for story in found)
    assert b"".join(story.encode() for story in found).split() == b"".join(chunks).split()
    lengths = Counter(len(piece.decode()) // 500 for piece in stories(chunks, "pieces", 2000))
    assert lengths.keys() <= {1, 2, 3, 4, 5}


BLANKS = b"\n\n".join(b"Story %d has an end." % number for number in range(50))


@pytest.mark.parametrize("n_marks", [1, 4])
def test_a_few_end_marks_among_many_blank_lines_are_refused_as_they_may_be_part_of_a_story(n_marks):
    text = BLANKS.replace(b"an end", b"<|endoftext|>", n_marks)
    with pytest.raises(plain_text.UnclearCutError, match=rf"{n_marks} times <\|endoftext\|> and 49 blank lines"):
        scan([text], SplitOptions(), 1)
    assert scan([text], SplitOptions(mode="blank-lines"), 1)[1].n_rows == 50
    assert scan([text], SplitOptions(mode="end-mark"), 1)[1].n_rows == n_marks + 1


def test_end_marks_that_are_many_or_stand_between_a_few_paragraphs_are_end_marks():
    assert scan([BLANKS.replace(b"\n\n", b"\n\n<|endoftext|>", 10)], SplitOptions(), 1)[0] == "end-mark"
    assert scan([BLANKS.replace(b"an end", b"<|endoftext|>", 5)], SplitOptions(), 1)[0] == "end-mark"


@pytest.mark.parametrize("run", [b"\n", b" ", b"\t", b"\r\n", b"\n "])
@pytest.mark.parametrize("mode", ["end-mark", "blank-lines", "articles"])
def test_white_space_without_end_is_not_held_in_memory(mode, run):
    splitter = make_splitter(mode, 50, at_start=True)
    spans = splitter.feed(b"One.")
    for _ in range(50):
        spans += splitter.feed(run * 1_000)
        assert len(splitter._buffer) <= splitter.lookahead_bytes
    spans += [*splitter.feed(b"\n\nTwo."), *splitter.finish()]
    assert len(spans) == (2 if mode == "blank-lines" else 1)


LINE = "The goat found a boat, and the owl sang till the end.\n"
QUOTED = '"The goat found a boat.\n\n""Look,"" said the owl."\n"The owl sang.\n\n""Good,"" said the goat."\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("One story.\nAnother story.\n", "--cut-text lines where each line is a story"),
        ("One story.\nAnother story.", "--cut-text lines where each line is a story"),
        ("\n One story.\r\n\tAnother story.\r\n\r\n", "--cut-text lines where each line is a story"),
        (QUOTED, "name it .csv"),
        ("story\n" + QUOTED, "name it .csv"),
        (QUOTED * 2000, "name it .csv"),
        ("One story.\rAnother story.\r", r"lines that end in '\\r' and none that ends in '\\n'"),
        ("One story.\u2029Another story.", r"lines that end in '\\u2029' and none"),
        (
            LINE * 30 + "\n" + LINE * 30,
            "about 61 lines, each a paragraph, and blank lines would make 2 stories of them",
        ),
        ("Stories\n\n" + LINE * 30, "blank lines would make 2 stories of them: give --cut-text lines"),
        ('{"text": "One story."}\n{"text": "Another story."}\n', "name it .jsonl or .json"),
        ('\ufeff{"text": "One story."}\n\n{"text": "Another story."}\n', "name it .jsonl or .json"),
        ('[\n {"text": "One story."}\n]', "name it .jsonl or .json"),
    ],
)
def test_a_guess_that_the_text_contradicts_is_refused(tmp_path, text, message):
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=message) as refused:
        plan_source(str(path))
    assert "\n" not in str(refused.value)
    assert plan_source(str(path), cut_text="blank-lines").n_rows >= 1


@pytest.mark.parametrize(
    "text",
    [
        '"Hi,"\n\n"Who is there?"\n\nHe said, "I am."\n',
        '"Hi," said Tom.\n\n"Go on\nand on."\n\nHe went.\n',
        '"It was late.\n\n"Nobody came," she said.\n',
        "One line alone.\n\n\n",
    ],
)
def test_prose_with_speech_is_no_csv(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert plan_source(str(tmp_path / "a.txt")).source["files"][0]["cut"] == "blank-lines"


@given(
    st.lists(st.sampled_from(["One.", " Two  two. ", "\u00e9"]), min_size=1), st.integers(1, 9), st.sampled_from("\n\r")
)
def test_a_line_is_a_story_and_a_blank_line_none(lines, size, end):
    end = "\r\n" if end == "\r" else end
    content = (end + end.join(f"{line}{end * (at % 3)}" for at, line in enumerate(lines))).encode()
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    found = list(read_stories(chunks, make_splitter("lines", 0, at_start=True)))
    assert [story.split() for story in found] == [line.encode().split() for line in lines]


@pytest.mark.parametrize("blank", ["  ", "\t\n \n", "\n", "\ufeff \n"])
def test_what_is_blank_before_the_first_line_is_no_story(blank):
    content = f"{blank}\nOne.\nTwo.\n".encode()
    assert stories([content], "lines") == [b"One.", b"Two."]


def test_lines_that_end_otherwise_are_not_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One story.\rAnother story.\r")
    with pytest.raises(UserError, match=r"write line ends as '\\n' \(tr '\\r' '\\n'\)$"):
        plan_source(str(tmp_path / "a.txt"), cut_text="lines")
    (tmp_path / "a.txt").write_bytes(b"One story.\r\nAnother story.\r")
    assert plan_source(str(tmp_path / "a.txt"), cut_text="lines").n_rows == 2


@pytest.mark.parametrize(
    "text",
    [
        LINE * 9 + "\n" + LINE * 9,  # paragraphs of one line each
        ("The goat found a boat,\nand the owl\n" * 30 + "\n") * 2,  # verses
        ("The goat found a boat, and the owl sang till the end of the\n" * 30 + "\n") * 2,  # wrapped prose
    ],
)
def test_several_lines_a_story_are_common(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert plan_source(str(tmp_path / "a.txt")).n_rows == 2

"""`.json`: lines, or one array as the archive of the original TinyStories has them."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.errors import UserError
from slm_ray.sources.json_lines import JsonLines
from slm_ray.sources.plan import plan_source
from slm_ray.sources.reading import read_ranges

FORMAT = JsonLines("story", may_be_array=True)
ELEMENTS = st.lists(st.fixed_dictionaries({"story": st.text(st.characters(exclude_categories=["Cs"]))}), max_size=6)


def read(path, **options):
    plan = plan_source(str(path), **options)
    return [text for task in plan.tasks for _, batch in read_ranges(task) for text in batch["text"].to_pylist()]


@given(ELEMENTS, st.sampled_from([None, 0, 2]), st.integers(1, 30), st.booleans())
def test_an_array_is_read_whatever_the_chunks(elements, indent, size, is_ascii):
    content = json.dumps(elements, indent=indent, ensure_ascii=is_ascii).encode()
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    settled, count = FORMAT.count("a.json", chunks, 4)
    assert count.n_rows == len(elements)
    assert [text.decode() for text, _ in settled.rows("a.json", chunks, at_start=True)] == [
        element["story"] for element in elements
    ]


def test_lines_and_an_array_are_the_same_stories(tmp_path):
    stories = [{"story": f'Story {number}, which is [nice], "short" and {{good}}.', "n": [1]} for number in range(9)]
    (tmp_path / "lines.json").write_text("".join(json.dumps(story) + "\n" for story in stories))
    (tmp_path / "array.json").write_text("\ufeff\n " + json.dumps(stories, indent=1))
    expected = [story["story"].encode() for story in stories]
    for name in ("lines.json", "array.json"):
        assert read(tmp_path / name, text_column="story", rows_per_range=4) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"story": "a"}, {"story": "b"', "is not a JSON array, or is cut short"),
        (b'[{"story": "a"} {"story": "b"}]', "expected , or ]"),
        (b'{"story":\n "a"}', "is not JSONL: its first line is not JSON"),
        (b"[1, 2]", "not an array of objects: its first element is a int"),
        (b'[{"text": "a"}]', "has no column 'story'; it has 'text': name the right one with --text-column"),
        (b'[{"story": 1}]', "is int in its first lines, expected strings"),
        (b"[]", "no stories in"),
        (
            b'[{"story": "a"}]\n[{"story": "b"}]\n',
            'goes on behind the end of its array, with \'[{"story": "b"}]\\n\': write',
        ),
        (b'[{"story": "a"}]\0', "goes on behind the end of its array, with '\\x00': write one array"),
        (b'[{"story": "a"}]' + b" " * 2**21 + b"[]", "goes on behind the end of its array, with '[]': write one array"),
    ],
)
def test_what_is_no_file_of_stories_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        plan_source(str(tmp_path / "a.json"), text_column="story")
    assert message in str(refused.value)


def test_a_bad_element_is_a_row(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"story": "a"}, {"story": null}, 7, {"story": "\xff"}]')
    (task,) = plan_source(str(tmp_path / "a.json"), text_column="story").tasks
    ((_, batch),) = read_ranges(task)
    assert batch["problem"].to_pylist() == [None, "not_text", "not_text", "invalid_utf8"]


def test_in_a_folder_with_stories_a_json_file_is_about_them(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "info.json").write_text('{"licence": "x"}\n')
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path) == [b"a"]
    assert "skipped 1 that may be about the stories beside them" in caplog.text


@pytest.mark.parametrize("form", ["[%s]", "%s\n"])
def test_a_number_of_any_length_beside_a_story_is_no_fault(tmp_path, form):
    (tmp_path / "a.json").write_text(form % ('{"story": "a", "n": %s}' % ("9" * 6000)))
    assert read(tmp_path / "a.json", text_column="story") == [b"a"]

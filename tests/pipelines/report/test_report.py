"""The report: right numbers, one page that needs nothing else, the same bytes each time, and no text that acts."""

import base64
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines.report import figures, measures, report
from slm_ray.dataset.manifest import Manifest, Shard, Split
from slm_ray.preparation.summary import DataSummary, Sample
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.pictures import assert_drawn, record_axes

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e"
SPLIT = Split.of((Shard(file="train/00000.parquet", rows=300, tokens=50_000, bytes=200_000, sha256="ab" * 32),))
NONE = Split.of(())


def make_manifest(tokenizer: Tokenizer, name: str = "a.jsonl") -> Manifest:
    file = {"name": name, "rows": 310, "sha256": "cd" * 32, "split": None}
    return Manifest(
        format_version=1,
        source={
            "requested": "files",
            "used": "files",
            "why": "",
            "revision": None,
            "digest": "e" * 64,
            "files": [file],
        },
        parameters={"keep_paragraphs": False, "min_chars": 50, "tokenizer": {"trained": {"vocab_size": 512}}},
        tokenizer={"sha256": "f" * 64, "vocab_size": tokenizer.vocab_size},
        splits={"train": SPLIT, "validation": NONE, "test": NONE},
        rejected=NONE,
        counts={},
        fingerprint="0123456789abcdef" * 4,
    )


def make_summary(tokenizer: Tokenizer, text: str = "Once upon a time.") -> DataSummary:
    tokens = [*tokenizer.encode(text), tokenizer.eos_id]
    token_counts = np.zeros(tokenizer.vocab_size, np.int64)
    token_counts[:100] = 10_000 // np.arange(1, 101)
    token_counts[100:110] = 3
    return DataSummary(
        splits={},
        rejected=NONE,
        read=310,
        kept=300,
        reasons={"near_duplicate": 7, "too_short": 3},
        examples={"near_duplicate": ["a.jsonl#4", "a.jsonl#9"], "too_short": ["a.jsonl#5"]},
        evidence={"a.jsonl#4": "Once", "a.jsonl#9": "Twice", "a.jsonl#5": text},
        chars=Counter({700 + number: 10 for number in range(30)}),
        words=Counter({140 + number: 10 for number in range(30)}),
        tokens=Counter({170 + 10 * number: 10 for number in range(30)}),
        word_counts={f"w{rank}": 100_000 // rank for rank in range(1, 3001)},
        token_counts=token_counts,
        samples=[Sample(story_id=f"a.jsonl#{n}", hash=f"{n:032x}", tokens=tokens, n_tokens=500) for n in range(5)],
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data") / "report"
    report.write(folder, make_manifest(tiny_tokenizer), make_summary(tiny_tokenizer), tiny_tokenizer)
    return folder


class Page(HTMLParser):
    """The text, the tags and the addresses of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.tags, self.addresses, self.titles = "", Counter[str](), [], []
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.text += " " * (tag in ("td", "th", "div", "span"))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.titles += [value for name, value in attrs if name == "title"]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_the_page_states_the_numbers(written):
    text = " ".join(Page((written / "report.html").read_text()).text.split())
    for part in (
        "a.jsonl Data set report. Fingerprint 0123456789abcdef",
        "near_duplicate 7 2.26%",
        "a.jsonl#9 Twice",
        "train 300 50,000 200,000 4.000 1",
        "characters 714.5 714 728 729",
        "tokens 315.0 310 450 460",
        "Suggested sequence length: 512 tokens.",
        "that holds the 95th percentile (450 tokens, end-of-text token included); "
        "100.0% of the stories fit into it whole, and 30.0% into 256.",
        "Fitted slope −1.00",
        "ranks spaced evenly in the logarithm from 10 to 1,000.",
        "3,000 different ones",
        "w1 100,000",
        "110 of 512 tokens of the vocabulary are used",
        "402 never occur, and 10 occur less than 10 times",
        "Five stories as tokens",
        "a.jsonl#0, 500 tokens",
        "tokenizer trained vocab size 512",
        "keep paragraphs no",
    ):
        assert part in text


def test_the_page_needs_nothing_else_and_holds_the_figures(written):
    content = (written / "report.html").read_text()
    page = Page(content)
    embedded = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in page.addresses]
    files = {path.name: path.read_bytes() for path in written.glob("*.png")}
    assert sorted(embedded) == sorted(files.values())
    assert set(files) == {f"{name}.png" for name in (
        "characters", "words", "tokens", "sequence", "zipf", "vocabulary", "rejections",
    )}  # fmt: skip
    for picture in embedded:
        assert_drawn(picture, (936, 585))
    assert not re.search(r"url\(|@import|https?:", content)
    assert not set(page.tags) & {"script", "link", "iframe", "object"}
    assert "prefers-color-scheme: dark" in content
    assert 'name="viewport"' in content


def test_the_figures_show_the_numbers(tiny_tokenizer, monkeypatch):
    found = make_summary(tiny_tokenizer)
    drawn = record_axes(monkeypatch)
    names = list(figures.draw_all(found))
    axes = dict(zip(names, (one for (one,) in drawn), strict=True))
    for name, histogram in (("characters", found.chars), ("words", found.words), ("tokens", found.tokens)):
        bars = axes[name].patches
        assert sum(bar.get_height() for bar in bars) == sum(histogram.values())
        for bar in bars:
            held = [
                count for length, count in histogram.items() if bar.get_x() <= length < bar.get_x() + bar.get_width()
            ]
            assert bar.get_height() == sum(held)
    steps = axes["sequence"].lines[1]
    lengths = sorted(found.tokens)
    assert steps.get_xdata().tolist() == lengths
    assert steps.get_ydata() == pytest.approx([100 * measures.share_within(found.tokens, one) for one in lengths])
    for name, counts in (("zipf", list(found.word_counts.values())), ("vocabulary", found.token_counts.tolist())):
        ranks, shown = (data.astype(int).tolist() for data in axes[name].lines[0].get_data())
        ordered = sorted((count for count in counts if count), reverse=True)
        assert [1, len(ordered)] == [ranks[0], ranks[-1]]
        assert shown == [ordered[rank - 1] for rank in ranks]
    bars = axes["rejections"].patches
    labels = [label.get_text() for label in axes["rejections"].get_yticklabels()]
    shown = dict(zip(labels, (bar.get_width() for bar in bars), strict=True))
    assert shown == {name.replace("_", " "): count for name, count in found.reasons.items()}


def test_each_token_has_its_border_and_its_id(written, tiny_tokenizer):
    [sample, *_] = make_summary(tiny_tokenizer).samples
    content = (written / "report.html").read_text()
    assert Page(content).titles[: len(sample.tokens)] == [f"token {token}" for token in sample.tokens]
    assert f'class="end" title="token {tiny_tokenizer.eos_id}">&lt;|endoftext|&gt;' in content
    assert f"and {500 - len(sample.tokens)} more tokens" in content


def test_equal_numbers_are_equal_bytes_whatever_the_user_set_up(written, tmp_path, tiny_tokenizer):
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 30, "axes.grid": True, "lines.linewidth": 9}):
        report.write(tmp_path, make_manifest(tiny_tokenizer), make_summary(tiny_tokenizer), tiny_tokenizer)
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_no_text_acts_as_markup(written, tmp_path, tiny_tokenizer, monkeypatch):
    pictures = {path.stem: b"" for path in written.glob("*.png")}
    monkeypatch.setattr(figures, "draw_all", lambda found: pictures)
    found = make_summary(tiny_tokenizer, HOSTILE)
    found = replace(
        found,
        reasons={HOSTILE: 3},
        examples={HOSTILE: [HOSTILE]},
        evidence={HOSTILE: HOSTILE},
        word_counts={**found.word_counts, HOSTILE: 10**6},
        samples=[replace(sample, story_id=HOSTILE) for sample in found.samples],
    )
    manifest = make_manifest(tiny_tokenizer, name=HOSTILE)
    manifest = replace(manifest, parameters={HOSTILE: {HOSTILE: HOSTILE}}, source={**manifest.source, "why": HOSTILE})
    report.write(tmp_path, manifest, found, tiny_tokenizer)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.keys() <= Page((written / "report.html").read_text()).tags.keys()
    assert page.text.count("<script>alert(1)</script>\"'&\\x1b[31m\\u202e") > 10
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_without_rejections_there_is_no_figure_of_them(tmp_path, tiny_tokenizer):
    found = replace(make_summary(tiny_tokenizer), reasons={}, examples={}, evidence={}, read=300)
    report.write(tmp_path, make_manifest(tiny_tokenizer), found, tiny_tokenizer)
    assert not (tmp_path / "rejections.png").exists()
    assert "No story was a duplicate, and none was rejected." in (tmp_path / "report.html").read_text()


def test_the_smallest_data_set_has_a_report(tmp_path, tiny_tokenizer):
    found = replace(
        make_summary(tiny_tokenizer), chars={1: 1}, words={1: 1}, tokens={2: 1}, word_counts={}, samples=[],
        token_counts=np.eye(1, tiny_tokenizer.vocab_size, dtype=np.int64)[0], read=1, kept=1,
    )  # fmt: skip
    report.write(tmp_path, make_manifest(tiny_tokenizer), found, tiny_tokenizer)
    page = (tmp_path / "report.html").read_text()
    assert "Too few different words to fit Zipf’s law." in page
    assert "Suggested sequence length: 64 tokens." in page


def test_the_suggested_length_is_the_smallest_power_that_holds_95_percent():
    assert [measures.suggested_seq_len({n: 1}) for n in (1, 64, 65, 512, 513, 3000)] == [64, 64, 128, 512, 1024, 4096]
    assert measures.suggested_seq_len({100: 95, 4000: 5}) == 128
    assert measures.suggested_seq_len({100: 94, 4000: 6}) == 4096
    assert measures.share_within({3: 1, 5: 3}, 4) == 0.25


@pytest.mark.parametrize("slope", [-1.3, -1.0, -0.6])
def test_the_slope_of_a_power_law_is_found(slope):
    counts = np.round(1e7 * np.arange(1, 2001) ** slope).astype(np.int64)
    fit = measures.fit_zipf(counts)
    assert fit is not None
    assert fit.slope == pytest.approx(slope, abs=0.001)
    assert fit.count_at(1) == pytest.approx(1e7, rel=0.01)
    assert (fit.first, fit.last) == (10, 1000)


def test_the_fit_ends_with_the_words():
    fit = measures.fit_zipf(1000 // np.arange(1, 201))
    assert fit is not None
    assert fit.last == 200
    assert measures.fit_zipf(np.arange(25, 0, -1)) is None

"""The whole pipeline: equal bytes on any runner, an account of every story, and mistakes in one line."""

import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from pipelines import explain, job, prepare
from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.corpus.grammar import sample_stories
from slm_ray.corpus.instructions import INSTRUCTION_TEMPLATE, STORY_TEMPLATE, with_instruction, without_instruction
from slm_ray.dataset.manifest import MANIFEST, load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.preparation import staging
from slm_ray.preparation.splits import story_hash
from slm_ray.sources import hub
from slm_ray.sources.plan import plan_source
from slm_ray.tokenization.loading import open_tokenizer
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.inputs import load_inputs
from slm_ray.training.preflight import resolve
from tests.support.paths import ROOT
from tests.support.sentencepiece_models import sentencepiece_model
from tests.support.source_files import set_rows_per_range

GOLDEN_FINGERPRINT = "c18bb6aa7ac0dc40fef902d948194a8bf1bb69bf75c7fc9d1bebe541e694578d"


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    """Ranges of 100 stories, so that a small input has several."""
    set_rows_per_range(monkeypatch, 100)


def run(output: Path, *words: str) -> int:
    trained = () if "--tokenizer" in words else ("--vocab-size", "512")
    return prepare.main(["--output", str(output), *trained, *words])


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_stories(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def story(number: int) -> str:
    return f"Once upon a time there was a mouse with {number} friends. They all lived in house {number}."


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """A data set of 320 sample stories, made in memory; not to be changed."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        set_rows_per_range(patch, 100)
        assert run(folder, "--runner", "DirectRunner", "--source", "sample", "--max-stories", "320") == 0
    return folder


SAMPLE = ("--source", "sample", "--max-stories", "320")


def test_a_data_set_is_whole_and_readable(sample):
    manifest = load_manifest(sample)
    tokenizer = Tokenizer.load(sample / "tokenizer.json")
    assert manifest.counts == {"read": 320, "kept": 320, "duplicates": 0, "rejected": {}}
    assert manifest.tokenizer["sha256"] == tokenizer.sha256
    for name, split in manifest.splits.items():
        tokens, n_bytes = read_split(sample, name)
        ends = tokens == tokenizer.eos_id
        assert (len(tokens), int(ends.sum())) == (split.tokens, split.rows)
        assert n_bytes == split.bytes == len(tokenizer.decode(tokens.tolist()).encode())
    assert [path.name for path in sorted(sample.iterdir())] == [
        "manifest.json", "report", "test", "tokenizer.json", "train", "validation",
    ]  # fmt: skip


def test_every_story_can_be_traced_to_its_row(sample):
    tokenizer = Tokenizer.load(sample / "tokenizer.json")
    from slm_ray.corpus.grammar import sample_stories

    texts = list(sample_stories(0, 320))
    for row in pq.read_table(sample / "train/00002.parquet").to_pylist():
        number = int(row["story_id"].removeprefix("sample#"))
        assert 200 <= number < 300
        assert tokenizer.decode(row["tokens"]) == " ".join(texts[number].split())


@pytest.mark.skipif(pa.__version__ != "25.0.1", reason="Parquet files carry the version of their writer")
def test_the_fingerprint_stays_what_it_was(tmp_path):
    source = write_stories(tmp_path / "mice.jsonl", [story(number) for number in range(150)])
    assert run(tmp_path / "data", "--source", str(source)) == 0
    assert load_manifest(tmp_path / "data").fingerprint == GOLDEN_FINGERPRINT


def test_every_story_is_accounted_for(tmp_path, capsys):
    texts = [story(number) for number in range(130)]
    texts[5], texts[120] = "Too short.", texts[7].upper() + "  \n"
    source = write_stories(tmp_path / "a.jsonl", texts)
    with source.open("ab") as file:
        file.write(b'{"text": 7}\n')
    assert run(tmp_path / "data", "--source", str(source)) == 0
    rejected = {"not_text": 1, "too_short": 1}
    counts = load_manifest(tmp_path / "data").counts
    assert counts == {"read": 131, "kept": 128, "duplicates": 1, "rejected": rejected}
    rows = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "data/rejected").iterdir()))
    assert rows.to_pylist() == [
        {"story_id": "a.jsonl#5", "reason": "too_short", "text": "Too short."},
        {"story_id": "a.jsonl#120", "reason": "duplicate", "text": texts[7].upper()},
        {"story_id": "a.jsonl#130", "reason": "not_text", "text": '{"text": 7}'},
    ]
    printed = capsys.readouterr().out
    assert "read 131 = kept 128 + duplicates 1 + rejected 2" in printed
    assert "e.g. a.jsonl#120" in printed


def test_a_validation_source_is_the_whole_validation_split_and_leaks_nothing(tmp_path):
    train = write_stories(tmp_path / "train.jsonl", [story(number) for number in range(120)])
    validation = write_stories(tmp_path / "validation.jsonl", [story(number).upper() for number in (3, 500)])
    assert run(tmp_path / "data", "--source", str(train), "--validation-source", str(validation)) == 0
    manifest = load_manifest(tmp_path / "data")
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 119, "validation": 2, "test": 0}
    assert pq.read_table(tmp_path / "data/rejected/00000.parquet")["story_id"].to_pylist() == ["train.jsonl#3"]


def test_the_letters_of_an_end_mark_in_a_story_end_nothing(tmp_path):
    source = write_stories(tmp_path / "a.jsonl", [story(1) + " <|endoftext|> " + story(2)])
    assert run(tmp_path / "data", "--source", str(source), "--validation-fraction", "0", "--test-fraction", "0") == 0
    tokens, _ = read_split(tmp_path / "data", "train")
    assert tokens.tolist().count(0) == 1


def test_a_tokenizer_is_reused(sample, tmp_path):
    file = str(sample / "tokenizer.json")
    assert run(tmp_path / "data", "--source", "sample", "--max-stories", "50", "--tokenizer", file) == 0
    assert load_manifest(tmp_path / "data").tokenizer == load_manifest(sample).tokenizer
    assert (tmp_path / "data/tokenizer.json").read_bytes() == (sample / "tokenizer.json").read_bytes()


def test_what_is_finished_is_not_done_again(sample, capsys):
    before = (sample / MANIFEST).stat().st_mtime_ns
    assert run(sample, *SAMPLE) == 0
    assert (sample / MANIFEST).stat().st_mtime_ns == before
    assert "already holds this data set" in capsys.readouterr().out


def test_other_parameters_are_refused_and_the_data_set_stays(sample, capsys):
    before = digests(sample)
    assert run(sample, *SAMPLE, "--min-chars", "60") == 2
    assert "another source or other parameters: choose another --output, or replace it with --force" in (
        capsys.readouterr().err
    )
    assert digests(sample) == before


def test_force_replaces_and_damage_is_repaired(tmp_path, capsys):
    source = write_stories(tmp_path / "a.jsonl", [story(number) for number in range(30)])
    data = tmp_path / "data"
    assert run(data, "--source", str(source)) == 0
    whole = digests(data)
    (data / "train/00000.parquet").write_bytes(b"x")
    assert run(data, "--source", str(source)) == 0
    assert "preparing again" in capsys.readouterr().err
    (data / "report/report.html").unlink()
    assert run(data, "--source", str(source)) == 0
    assert "report.html is missing" in capsys.readouterr().err
    assert digests(data) == whole
    assert run(data, "--source", str(source), "--max-stories", "20", "--force") == 0
    assert load_manifest(data).counts["read"] == 20


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_folders_of_somebody_else_are_not_replaced(tmp_path, capsys, force):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/thesis.txt").write_text("years of work")
    assert run(tmp_path, "--source", "sample", "--max-stories", "5", *force) == 2
    assert "holds report, which is no data set of this program" in capsys.readouterr().err
    assert (tmp_path / "report/thesis.txt").exists()


def test_a_failing_job_leaves_the_earlier_data_set_whole(tmp_path, capsys):
    data = tmp_path / "data"
    assert run(data, "--source", str(write_stories(tmp_path / "a.jsonl", [story(n) for n in range(30)]))) == 0
    manifest = (data / MANIFEST).read_bytes()
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": ["some words " * 2000]}), bad)
    content = bytearray(bad.read_bytes())
    content[60:90] = bytes(byte ^ 255 for byte in content[60:90])
    bad.write_bytes(content)
    assert run(data, "--source", str(bad), "--force") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"error: {bad} is damaged and cannot be read as Parquet")
    assert "while running" not in error
    assert (data / MANIFEST).read_bytes() == manifest
    assert len(read_split(data, "train")[0])


def test_a_fallback_is_said_loudly_and_kept_when_the_network_returns(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    monkeypatch.setattr(hub, "unreachable", lambda name: "no network")
    assert run(data, "--max-stories", "40") == 0
    assert "NOT real TinyStories: the hub could not be used (no network)" in capsys.readouterr().err
    manifest = load_manifest(data)
    assert (manifest.source["requested"], manifest.source["used"]) == ("auto", "sample")

    stand_in = plan_source("sample", max_stories=40, seed=9)
    monkeypatch.setattr(job, "make_plan", lambda settings: stand_in)
    assert run(data, "--max-stories", "40") == 0
    assert "already holds this data set" in capsys.readouterr().out
    assert load_manifest(data) == manifest

    assert run(data, "--max-stories", "40", "--seed", "5") == 2
    assert "holds a data set from another source or other parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-storys", "3"], "unknown option --max-storys: did you mean --max-stories?"),
        (["--max-stories", "many"], "argument --max-stories: invalid int value: 'many' (see --help)"),
        (["--max-stories", "0"], "max_stories (0) must be at least 1"),
        (["stray"], "stray belongs to no option"),
        (["--test-fraction", "1.5"], "must be 0 or more, and leave a share for train"),
        (["--min-chars", "9", "--max-chars", "3"], "min_chars (9) must be from 0 to max_chars (3)"),
        (["--vocab-size", "100"], "vocab_size (100) must be at least 257"),
        (["--tokenizer", ""], "a tokenizer is an empty word"),
        (["--source", ""], "a source is an empty word: name auto, sample, hub:NAME, or files"),
        (["--output", ""], "a path is an empty word"),
        (["--source", "~nosuchuser/a.jsonl"], "cannot read ~nosuchuser/a.jsonl"),
        (["--validation-fraction", "nan"], "must be 0 or more, and leave a share for train"),
        (["--runner", "Nonsense"], "cannot use the runner Nonsense"),
        (
            ["--direct_num_workers", "-1", "--direct_running_mode", "multi_processing"],
            "direct_num_workers (-1) must be",
        ),
        (["--tokenizer", "a" * 300], "cannot read the tokenizer aaa"),
        (["--source", "absent/"], "no such file, folder or glob: absent/"),
        (["--tokenizer", "absent.json"], "cannot read the tokenizer absent.json: No such file or directory"),
        (["--output", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--tokenizer", "gpt2", "--vocab-size", "300"], "--vocab-size is of a tokenizer that is trained"),
        (["--source=a", "b"], "b belongs to no option: --option=VALUE takes one word"),
        (
            ["--min-chars", "9999"],
            "most frequent reason: too_short (5): cut prose in text files with --cut-text pieces, or lower --min-chars",
        ),
        (["--min-chars", "9999"], "5 of 5 stories (100.0%) were rejected, more than 5.0%"),
        (
            ["--min-chars", "9999", "--max-rejected", "1"],
            "no story is left for training of 5 read; most frequent reason: too_short (5)",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, words, message):
    source = () if any(word.startswith("--source") for word in words) else ("--source", "sample")
    assert run(tmp_path / "data", *source, "--max-stories", "5", *words) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("prepare: ")]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "data" / MANIFEST).exists()


@pytest.mark.parametrize("output", ["stories", "stories/out"])
def test_an_output_inside_the_source_folder_is_refused_at_once(tmp_path, capsys, output):
    (tmp_path / "stories").mkdir()
    write_stories(tmp_path / "stories" / "a.jsonl", [story(number) for number in range(20)])
    assert run(tmp_path / output, "--source", str(tmp_path / "stories")) == 2
    assert "lies in the source folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stories").iterdir()] == ["a.jsonl"]


def test_a_glob_that_finds_the_data_set_itself_is_refused(sample, capsys):
    before = digests(sample)
    assert run(sample, "--source", str(sample / "*" / "*.parquet"), "--force") == 2
    assert "a file of the data set in" in capsys.readouterr().err
    assert digests(sample) == before


def test_a_job_that_lost_its_tokenizer_learns_it_again(tmp_path, capsys):
    source = write_stories(tmp_path / "a.jsonl", [story(number) for number in range(30)] + ["short"])
    words = ("--source", str(source))
    assert run(tmp_path / "data", *words, "--max-rejected", "0") == 2
    [learned] = (tmp_path / "data").glob(".staging/*/tokenizer.json")
    learned.unlink()
    assert run(tmp_path / "data", *words) == 0


def test_near_duplicates_are_told_apart_from_equal_stories(tmp_path, capsys):
    long = " ".join(story(number) for number in range(8))
    source = write_stories(tmp_path / "a.jsonl", [long, long.upper(), long + " The end.", story(9)])
    assert (
        run(tmp_path / "data", "--source", str(source), "--near-duplicates", "0.8", "--validation-fraction", "0") == 0
    )
    counts = load_manifest(tmp_path / "data").counts
    assert counts == {"read": 4, "kept": 2, "duplicates": 2, "near_duplicates": 1, "rejected": {}}
    printed = capsys.readouterr().out
    assert "near_duplicate               1  e.g. a.jsonl#2" in printed
    assert "duplicate                    1  e.g. a.jsonl#1" in printed


def test_a_manifest_of_another_version_is_replaced_with_force(tmp_path, capsys):
    source = write_stories(tmp_path / "a.jsonl", [story(number) for number in range(30)])
    assert run(tmp_path / "data", "--source", str(source)) == 0
    manifest = tmp_path / "data" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 0'))
    assert run(tmp_path / "data", "--source", str(source)) == 2
    assert "prepare the data again, with --force" in capsys.readouterr().err
    assert run(tmp_path / "data", "--source", str(source), "--force") == 0


def test_a_torn_manifest_is_named_and_replaced_with_force(tmp_path, capsys):
    words = ("--source", str(write_stories(tmp_path / "a.jsonl", [story(number) for number in range(30)])))
    assert run(tmp_path / "data", *words) == 0
    whole = digests(tmp_path / "data")
    (tmp_path / "data" / MANIFEST).write_text("{")
    assert run(tmp_path / "data", *words) == 2
    assert "manifest.json is no manifest this version reads (Expecting" in capsys.readouterr().err
    (tmp_path / "data" / "train" / "cat.png").write_bytes(b"somebody's")
    assert run(tmp_path / "data", *words, "--force") == 2
    (tmp_path / "data" / "train" / "cat.png").unlink()
    assert run(tmp_path / "data", *words, "--force") == 0
    assert digests(tmp_path / "data") == whole


def test_both_spellings_of_an_option_are_one(sample, capsys):
    assert run(sample, "--source=sample", "--max_stories=320", "--min_chars=50") == 0
    assert "already holds this data set" in capsys.readouterr().out


def test_the_report_shows_this_data_set(sample):
    page = (sample / "report/report.html").read_text()
    assert page.count('class="story"') == 5
    assert load_manifest(sample).fingerprint in page
    assert re.search(r"licence of the stories</td>\s*<td>Apache-2.0", page), "of the sample corpus"


@pytest.mark.slow
def test_it_runs_as_a_script_from_the_checkout(tmp_path):
    words = [
        "--runner",
        "DirectRunner",
        "--source",
        "sample",
        "--max-stories",
        "20",
        "--vocab-size",
        "300",
        "--validation-fraction",
        "0.3",
    ]
    done = subprocess.run(
        [sys.executable, "pipelines/prepare.py", *words, "--output", str(tmp_path / "d")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "prepare: 1 of 1 ranges cleaned\nprepare: 1 of 1 ranges written\n")
    assert done.stdout.splitlines()[-1].startswith(f"data set in {tmp_path / 'd'}")


def test_a_tokenizer_that_loses_text_is_refused(sample, tmp_path, capsys):
    config = json.loads((sample / "tokenizer.json").read_text())
    (tmp_path / "lossy.json").write_text(json.dumps({**config, "normalizer": {"type": "Lowercase"}}))
    assert run(tmp_path / "data", *SAMPLE, "--tokenizer", str(tmp_path / "lossy.json")) == 2
    assert "lossy.json loses text: its normaliser (Lowercase)" in capsys.readouterr().err


def test_two_jobs_do_not_write_to_one_folder(tmp_path, capsys):
    data = tmp_path / "data"
    with staging.locked(data):
        staged = staging.begin(data, "other")
        assert run(data, *SAMPLE) == 2
        assert f"error: another prepare.py is writing to {data}: wait" in capsys.readouterr().err
        assert staged.exists()
    assert run(data, "--source", "sample", "--max-stories", "20") == 0


def test_ctrl_c_while_beam_is_imported_ends_in_one_line(tmp_path):
    (tmp_path / "apache_beam.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "pipelines/prepare.py", "--source", "sample", "--output", str(tmp_path / "d")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_too_little_text_to_train_on_is_said_when_it_is_prepared(tmp_path, capsys):
    source = write_stories(tmp_path / "mice.jsonl", [story(1), story(2)])
    fractions = ["--validation-fraction", "0", "--test-fraction", "0"]
    assert run(tmp_path / "data", "--runner", "DirectRunner", "--source", str(source), *fractions) == 0
    printed = capsys.readouterr().err
    n_tokens = load_manifest(tmp_path / "data").splits["train"].tokens
    assert f"warning: the training split has {n_tokens} tokens, and one sample of the default model needs" in printed
    assert "warning: no story is in the validation split, without which train.py does not begin" in printed
    assert "entries and not 512" in printed


def test_enough_text_is_not_warned_of(tmp_path, capsys):
    words = ["--source", "sample", "--max-stories", "200", "--validation-fraction", "0.1", "--runner", "DirectRunner"]
    assert run(tmp_path / "data", *words) == 0
    assert "warning" not in capsys.readouterr().err


def test_instructions_stand_before_the_stories_that_fulfil_them(tmp_path, capsys):
    texts = [*sample_stories(0, 60), next(sample_stories(7, 8)).upper()]
    source = write_stories(tmp_path / "a.jsonl", texts)
    words = ("--source", str(source), "--validation-fraction", "0.2")
    assert run(tmp_path / "plain", *words) == 0
    assert run(tmp_path / "data", *words, "--instructions") == 0
    plain, instructed = load_manifest(tmp_path / "plain"), load_manifest(tmp_path / "data")
    assert not plain.has_instructions and "instructions" not in plain.parameters
    assert instructed.has_instructions and instructed.fingerprint != plain.fingerprint
    assert {name: split.rows for name, split in instructed.splits.items()} == {
        name: split.rows for name, split in plain.splits.items()
    }
    tokenizer = Tokenizer.load(tmp_path / "data/tokenizer.json")
    for split in ("train", "validation"):
        for row in pq.read_table(tmp_path / "data" / split).to_pylist():
            story = " ".join(texts[int(row["story_id"].removeprefix("a.jsonl#"))].split())
            text = tokenizer.decode(row["tokens"])
            assert text == with_instruction(story, story_hash(story))
            assert row["n_bytes"] == len(text.encode()) and without_instruction(text) == story
    other = Tokenizer.load(tmp_path / "plain/tokenizer.json")
    marks = "Features: Dialogue\nWords: \nStory:\n"
    assert len(tokenizer.encode(marks)) < len(other.encode(marks)), "it learned from stories alone"
    assert "a.jsonl#7 in " in explain.explain(tmp_path / "data", "a.jsonl#60")
    assert run(tmp_path / "data", *words) == 2
    assert "holds a data set from another source or other parameters" in capsys.readouterr().err
    config = TrainConfig(data=str(tmp_path / "data"), output=str(tmp_path / "runs"), max_steps=1, workers=1)
    small = dataclasses.replace(config, model=ModelConfig(seq_len=16))
    assert load_inputs(resolve(small, lambda _: 1), NullTracker()).chat_template == INSTRUCTION_TEMPLATE
    small = dataclasses.replace(small, data=str(tmp_path / "plain"))
    assert load_inputs(resolve(small, lambda _: 1), NullTracker()).chat_template == STORY_TEMPLATE


def test_a_sentencepiece_model_of_its_defaults_normalises_and_says_what_it_cannot_write(tmp_path, capsys):
    defaults = {"normalization_rule_name": "nmt_nfkc", "byte_fallback": False, "remove_extra_whitespaces": True}
    (tmp_path / "stories.model").write_bytes(sentencepiece_model("unigram", **defaults))
    texts = list(sample_stories(0, 40))
    texts[3] = texts[3].replace("fi", "\N{LATIN SMALL LIGATURE FI}") + "\u3000The end."
    texts[4] += " 日本."
    texts[5] = unicodedata.normalize("NFKC", texts[3])
    source = write_stories(tmp_path / "a.jsonl", texts)
    words = ("--source", str(source), "--tokenizer", str(tmp_path / "stories.model"))
    assert run(tmp_path / "data", *words) == 0
    manifest = load_manifest(tmp_path / "data")
    assert manifest.counts == {"read": 40, "kept": 38, "duplicates": 1, "rejected": {"not_in_tokenizer": 1}}
    assert manifest.parameters["tokenizer"]["normalisation"]["joins_spaces"]
    assert "normalisation charsmap sha256" in (tmp_path / "data/report/report.html").read_text(encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path / "data/tokenizer.json")
    rows = {
        row["story_id"]: row for name in ("train", "validation", "test") for row in rows_of(tmp_path / "data", name)
    }
    expected = " ".join(unicodedata.normalize("NFKC", texts[3]).split())
    assert tokenizer.decode(rows["a.jsonl#3"]["tokens"]) == expected
    assert rows["a.jsonl#3"]["n_bytes"] == len(expected.encode())
    (evidence,) = [row for row in rows_of(tmp_path / "data", "rejected") if row["story_id"] == "a.jsonl#4"]
    assert evidence["text"].startswith("no piece for 日 本 in: ")
    for option in ("--instructions", "--keep-paragraphs"):
        capsys.readouterr()
        assert run(tmp_path / "other", *words, option) == 2
        assert f"{option} writes line breaks, and the tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_tokenizer_without_the_letters_of_instructions_is_refused(tmp_path, capsys):
    written = io.BytesIO()
    lines = [f"the cat saw a dog.\nit ran to tree {number}." for number in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
    )  # fmt: skip
    (tmp_path / "lower.model").write_bytes(written.getvalue())
    source = write_stories(tmp_path / "a.jsonl", [f"{line} the end." for line in lines[:20]])
    words = ("--source", str(source), "--tokenizer", str(tmp_path / "lower.model"), "--min-chars", "1")
    assert run(tmp_path / "data", *words, "--keep-paragraphs") == 0
    capsys.readouterr()
    assert run(tmp_path / "other", *words, "--instructions") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --instructions writes words such as 'Story:', and the tokenizer") and " W " in line
    assert not (tmp_path / "other").exists()


def rows_of(folder: Path, name: str) -> list[dict]:
    return pq.read_table(folder / name).to_pylist() if (folder / name).exists() else []


def test_instructions_and_options_that_contradict_them_are_refused(tmp_path, capsys):
    assert run(tmp_path / "data", "--instructions", "--explain", "a.jsonl#1") == 2
    assert "--explain prepares nothing: leave out --instructions" in capsys.readouterr().err


def test_a_tokenizer_alone_is_that_of_the_data_set_and_can_be_given_to_one(tmp_path, capsys):
    few = ("--source", "sample", "--max-stories", "100")
    made = (*few, "--tokenizer-model", "unigram")
    assert run(tmp_path / "alone", *made, "--tokenizer-only") == 0
    assert "512 entries (unigram) of 100 stories" in capsys.readouterr().out
    names = ["tokenizer.json", "tokenizer.model", "tokenizer.vocab"]
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == names
    assert run(tmp_path / "data", *made) == 0
    for name in names:
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "data/tokenizer.model"))
    tokenizer = Tokenizer.load(tmp_path / "alone/tokenizer.json")
    assert len((tmp_path / "alone/tokenizer.vocab").read_text(encoding="utf-8").splitlines()) == 513
    for row in rows_of(tmp_path / "data", "train"):
        text = tokenizer.decode(row["tokens"])
        assert [*model.encode(text), model.eos_id()] == row["tokens"] and model.decode(row["tokens"]) == text
    assert open_tokenizer(str(tmp_path / "alone")).sha256 == tokenizer.sha256
    (tmp_path / "data/tokenizer.vocab").write_text("mine", encoding="utf-8")
    assert run(tmp_path / "data", *few, "--tokenizer", str(tmp_path / "alone"), "--force") == 0
    assert load_manifest(tmp_path / "data").tokenizer["sha256"] == tokenizer.sha256
    assert not (tmp_path / "data/tokenizer.model").exists(), "of the data set before"
    assert (tmp_path / "data/tokenizer.vocab").read_text(encoding="utf-8") == "mine"
    assert run(tmp_path / "data", *made, "--force") == 2
    assert "holds tokenizer.vocab, not written by this program" in capsys.readouterr().err


def test_a_tokenizer_alone_is_not_put_over_what_is_there(tmp_path, sample, capsys):
    assert run(tmp_path / "alone", *SAMPLE, "--tokenizer-only") == 0
    for words, said in (
        ([str(tmp_path / "alone"), "--tokenizer-only"], "holds tokenizer.json: choose another --output, or replace it"),
        ([str(sample), "--tokenizer-only", "--force"], "holds a data set: choose another --output"),
        ([str(tmp_path / "a"), "--tokenizer-only", "--near-duplicates", "0.8"], "--near-duplicates chooses stories"),
        ([str(tmp_path / "a"), "--tokenizer-only", "--tokenizer", "gpt2"], "--tokenizer-only trains a tokenizer"),
        ([str(tmp_path / "a"), "--tokenizer-only", "--min-chars", "9999"], "stories (100.0%) were rejected"),
    ):
        capsys.readouterr()
        assert run(Path(words[0]), *SAMPLE, *words[1:]) == 2
        assert said in capsys.readouterr().err
    assert run(tmp_path / "alone", *SAMPLE, "--tokenizer-only", "--force", "--vocab-size", "300") == 0
    assert Tokenizer.load(tmp_path / "alone/tokenizer.json").vocab_size == 300

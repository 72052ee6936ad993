"""The command line of prepare.py: own options checked and documented, Beam's handed on, mistakes in one line."""

import dataclasses
import io
import re
import sys

import pytest
from apache_beam.options.pipeline_options import DirectOptions, StandardOptions

from pipelines import options, prepare
from pipelines.config import PrepareConfig
from slm_ray.errors import UserError
from slm_ray.preparation.cleaning import CleaningRules


def test_without_options_the_defaults_hold():
    beam_options, config = options.parse([])
    assert config == PrepareConfig()
    assert (config.sources, config.trained_vocab_size, config.rules) == (("auto",), 4096, CleaningRules())
    assert beam_options.get_all_options(drop_default=True) == {}


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (
            "--source a b --source=c --validation_source d e",
            {"source": ("a", "b", "c"), "validation_source": ("d", "e")},
        ),
        ("--source -5 --max-stories=3 --max_stories 4", {"source": ("-5",), "max_stories": 4}),
        (
            "--cut-text blank-lines --force --near-duplicates 0.8",
            {"cut_text": "blank-lines", "force": True, "near_duplicates": 0.8},
        ),
        (
            "--no_repair_encoding --keep-paragraphs --min_chars 3",
            {"rules": CleaningRules(repair_encoding=False, keep_paragraphs=True, min_chars=3)},
        ),
    ],
)
def test_options_are_read_in_both_spellings_and_lists_add_up(words, changes):
    assert options.parse(words.split())[1] == PrepareConfig(**changes)


def test_other_options_are_handed_on_to_beam():
    words = "--runner X --source a b --direct_num_workers -1 --direct_running_mode=multi_threading --max-stories 3"
    beam_options, config = options.parse(words.split())
    direct = beam_options.view_as(DirectOptions)
    assert (direct.direct_num_workers, direct.direct_running_mode) == (-1, "multi_threading")
    assert beam_options.view_as(StandardOptions).runner == "X"
    assert config == PrepareConfig(source=("a", "b"), max_stories=3)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # in which tyro draws its boxes otherwise
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--near-duplicates x", "--near-duplicates: invalid float value: 'x' (see --help)"),
        ("--max-stories None", "--max-stories: invalid int value: 'None' (see --help)"),
        ("--min-chars 1.5", "--min-chars: invalid int value: '1.5' (see --help)"),
        ("--output", "--output: expected one argument (see --help)"),
        ("--tokenizer-model x", "--tokenizer-model: invalid choice: 'x' (choose from 'bpe', 'unigram') (see --help)"),
        ("--direct_num_workers x", "--direct_num_workers: invalid int value: 'x' (see --help)"),
        ("--min_chrs 3", "unknown option --min_chrs: did you mean --min_chars?"),
        ("--no-repair-encodings", "unknown option --no-repair-encodings: did you mean --no-repair-encoding?"),
        ("--runer X", "unknown option --runer: did you mean --runner?"),
        ("--nothing-like-it 3", "unknown option --nothing-like-it, see --help"),
    ],
)
def test_a_mistake_is_named_in_one_line(monkeypatch, encoding, words, message):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as error:
        options.parse(words.split())
    assert str(error.value).removeprefix("argument ") == message


def test_the_help_describes_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ending:
        options.parse(["--help"])
    shown = capsys.readouterr().out
    assert ending.value.code == 0
    names = {field.name for kind in (PrepareConfig, CleaningRules) for field in dataclasses.fields(kind)} - {"rules"}
    assert names == {name.replace("-", "_") for name in re.findall(r"^[ │]+--([a-z][a-z-]+)", shown, re.M)}
    assert "None" not in shown
    assert "Beam's own options pass through: --runner" in shown


def test_a_model_to_train_beside_a_tokenizer_is_refused(capsys):
    for model in ("bpe", "unigram"):
        assert prepare.main(["--tokenizer", "x.json", "--tokenizer-model", model]) == 2
        assert "--tokenizer-model says what to train, and --tokenizer names one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--piece-chars 500", "--piece-chars is of --cut-text pieces"),
        ("--source a.txt --seed 3", "--seed is of the sample corpus"),
        ("--tokenizer= --vocab-size 300", "--vocab-size is of a tokenizer that is trained"),
        ("--tokenizer=", "a tokenizer is an empty word"),
    ],
)
def test_what_would_be_ignored_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        options.parse(words.split())
    options.parse(["--piece-chars", "500", "--cut-text", "pieces", "--seed", "3"])

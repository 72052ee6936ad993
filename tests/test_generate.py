"""The command that prints stories."""

from pathlib import Path

import pytest

from slm_ray import generate
from slm_ray.generation import cache_size
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("generate") / "tiny"))


def test_prints_every_story_with_its_prompt_and_the_same_for_the_same_seed(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", model, "--prompt", "The cat", "Tom", "--max-tokens", "20", "--seed", "3", "--top_k", "0"]
    assert generate.main(options) == 0
    first = capsys.readouterr().out
    assert first.startswith("The cat") and "\n\nTom" in first
    assert generate.main(options) == 0
    assert capsys.readouterr().out == first


def test_a_prompt_is_utf8_where_the_locale_is_ascii(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed = "猫".encode().decode("ascii", "surrogateescape")  # as Python reads its arguments there
    assert generate.main(["--model", model, "--prompt", typed, "--max-tokens", "1", "--seed", "3"]) == 0
    assert capsys.readouterr().out.startswith("猫")


def test_a_stop_text_and_a_penalty_have_their_effect(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*options: str) -> str:
        assert generate.main(["--model", model, "--prompt", "The cat", "--temperature", "0", *options]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    whole = write()
    middle = whole[len(whole) // 2 :][:3]
    assert write("--stop", middle) == whole[: whole.index(middle, len("The cat"))]
    assert write("--repetition-penalty", "10") != whole


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "-1"], "temperature (-1.0) must be between 0 and 100"),
        (["--temperature", "nan"], "temperature (nan) must be a finite number"),
        (["--repetition-penalty", "0"], "repetition_penalty (0.0) must be between 0.1 and 10"),
        (["--stop", ""], "stop must hold texts of 1 to 256 characters"),
        (["--max-tokens", "0"], "max_tokens (0) must be at least 1"),
        (["--prompt", "x" * 64], "the prompt has 64 tokens and the context of this model holds 63"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    model: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--model", model, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_and_corrupt_models_are_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", str(tmp_path / "none")]) == 2
    assert "no model" in capsys.readouterr().err
    damaged = write_tiny_model(tmp_path / "damaged")
    weights = damaged / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert generate.main(["--model", str(damaged)]) == 2
    assert "corrupt" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        generate.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--prompt", "--max-tokens", "--temperature", "--top-k", "--top-p", "--seed"):
        assert option in text


def test_a_cache_that_is_too_large_for_the_machine_is_refused_before_it_is_made(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_size, "available_bytes", lambda: 100_000)
    assert generate.main(["--model", model, "--prompt", "a", "b", "c", "d"]) == 2
    error = capsys.readouterr().err
    assert "the cache of 4 stories" in error and "give fewer prompts at once" in error and error.count("\n") == 1

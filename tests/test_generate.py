"""The command that prints stories."""

import asyncio
import collections
import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from serve.api.routes import create_api
from serve.models.loaded_model import LoadedModel
from serve.models.rollout import Rollout
from slm_ray import generate
from slm_ray.errors import UserError
from slm_ray.generation import backend_choice, cache_size, prompt_files, torch_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.prompt_files import PromptFile
from slm_ray.model import device as model_device
from slm_ray.tracking.registry import resolve_model
from tests.support.paths import ROOT
from tests.support.tiny_model import write_endless_model, write_tiny_model


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


def test_no_character_of_a_prompt_acts_on_a_terminal(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("A \x1b[2Jcat\nThe \u202edog\n", encoding="utf-8")
    options = ["--model", model, "--prompts", str(tmp_path / "p.txt"), "--max-tokens", "1", "--seed", "3"]
    assert generate.main(options) == 0
    assert "\x1b[2Jcat" in capsys.readouterr().out  # in a pipe, as it is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate.main(options) == 0
    out = capsys.readouterr().out
    assert out.startswith(r"A \x1b[2Jcat") and "\n\nThe \\u202edog" in out


def test_a_stop_text_and_a_penalty_have_their_effect(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def write(*options: str) -> str:
        assert generate.main(["--model", model, "--prompt", "The cat", "--temperature", "0", *options]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    whole = write()
    middle = whole[len(whole) // 2 :][:3]
    assert write("--stop", middle) == whole[: whole.index(middle, len("The cat"))]
    for penalty in (["--repetition-penalty", "10"], ["--presence-penalty", "2"], ["--frequency-penalty", "2"]):
        assert write(*penalty) != whole
    assert write("--temperature", "1", "--top-k", "0", "--min-p", "1") == whole


@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "-1"], "temperature (-1.0) must be between 0 and 100"),
        (["--temperature", "nan"], "temperature (nan) must be a finite number"),
        (["--repetition-penalty", "0"], "repetition_penalty (0.0) must be between 0.1 and 10"),
        (["--presence-penalty", "3"], "presence_penalty (3.0) must be between -2 and 2"),
        (["--min-p", "1.5"], "min_p (1.5) must be between 0 and 1"),
        (["--stop", ""], "stop must hold texts of 1 to 256 characters"),
        (["--max-tokens", "0"], "max_tokens (0) must be at least 1"),
        (["--n", "0"], "n (0) must be from 1 to 1000"),
        (["--rows", "0"], "rows (0) must be from 1 to 256"),
        (["--backend", "magic"], "--backend"),
        (["--prompts", "absent.txt"], "cannot read the prompts in absent.txt: No such file or directory"),
        (["--prompts", "."], "cannot read the prompts in .: Is a directory"),
        (["--prompts", "a\0b"], "cannot read the prompts in"),
        (["--prompts", "a", "--prompt", "b"], "--prompt and --prompts say twice where prompts come from"),
        (["--interactive", "--prompt", "b"], "--prompt and --interactive say twice where prompts come from"),
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
    assert "the cache of 4 stories" in error and "give fewer --rows" in error and error.count("\n") == 1


@pytest.mark.parametrize(("on_gpu", "code"), [(None, 2), (100_000, 2), (10**10, 0)])
def test_a_cache_is_compared_with_the_memory_that_it_takes(
    model: str, on_gpu: int | None, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: of a card's memory the machine's says nothing."""
    monkeypatch.setattr(cache_size, "available_bytes", lambda: 100_000 if on_gpu is None else 10**10 - on_gpu)
    monkeypatch.setattr(model_device, "free_on_gpu", lambda _: on_gpu)
    monkeypatch.setattr(backend_choice, "free_on_gpu", lambda _: on_gpu)
    assert generate.main(["--model", model, "--max-tokens", "2", "--prompt", "a", "b", "c", "d"]) == code
    where = "memory" if on_gpu is None else "the GPU's memory"
    assert (f"of {where} are free" in capsys.readouterr().err) == bool(code)


def test_a_gpu_without_room_for_the_cache_is_one_line(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    monkeypatch.setattr(torch_backend.KVCache, "empty", full)
    assert generate.main(["--model", model, "--backend", "torch", "--max-tokens", "2"]) == 2
    error = capsys.readouterr().err
    assert "no room for the cache of 1 story" in error and error.count("\n") == 1


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert generate.main(["--json", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


FILES = [
    ("prompts.txt", b"The cat\n\nTom\nA fox", ["The cat", "Tom", "A fox"]),
    ("prompts.txt", "\ufeffThe cat\r\n  Tom \r\n".encode(), ["The cat", "  Tom "]),
    ("prompts.txt", 'a\u2028b\n{"prompt": 3\n'.encode(), ["a\u2028b", '{"prompt": 3']),
    ("prompts.jsonl", b'{"prompt": "The cat"}\n\n{"prompt": ""}\n', ["The cat", ""]),
    ("prompts", b'{"prompt": "The cat"}\n{"prompt": "two\\nlines"}\n', ["The cat", "two\nlines"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES)
def test_a_file_of_prompts_is_written_as_the_prompts_themselves(
    model: str, name: str, content: bytes, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    options = ["--model", model, "--max-tokens", "12", "--seed", "3"]
    assert generate.main([*options, "--prompts", str(tmp_path / name), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert generate.main([*options, "--prompt", *expected]) == 0
    assert capsys.readouterr().out == out
    assert [one["prompt"] for one in lines(capsys, *options, "--prompts", tmp_path / name)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "p.txt is empty"),
        ("p.txt", b" \n\r\n", "p.txt is empty"),
        ("p.txt", b"One\nTwo \xff\n", "p.txt, line 2: it is not UTF-8 text"),
        (
            "p.txt",
            b"One\n" + b"x" * 64,
            "p.txt, line 2: the prompt has 64 tokens and the context of this model holds 63",
        ),
        ("p.jsonl", b'{"prompt": "a"}\nplain\n', "p.jsonl, line 2: it is not JSON"),
        ("p.jsonl", b'{"text": "a"}', 'p.jsonl, line 1: expected an object with a text, {"prompt": '),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl, line 1: expected an object with a text"),
        ("p.jsonl", b'["prompt"]', "p.jsonl, line 1: expected an object with a text"),
        ("p.jsonl", b'{"prompt": "a", "seed": 3}', "p.jsonl, line 1: unknown field 'seed'"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "p.jsonl, line 1: the prompt is no Unicode text"),
    ],
)
def test_a_mistake_in_a_file_of_prompts_is_one_line_and_nothing_is_written(
    model: str, name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert generate.main(["--model", model, "--prompts", str(tmp_path / name)]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1
    assert out == ""


def test_a_line_of_json_has_all_that_writes_the_story_again(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--max-tokens", "12", "--temperature", "1", "--prompt", "The cat", "Tom", "--n", "2"]
    found = lines(capsys, *words)
    assert [one["prompt"] for one in found] == ["The cat", "The cat", "Tom", "Tom"]
    for one in found:
        (again,) = lines(capsys, *words[:6], "--prompt", one["prompt"], "--seed", one["seed"])
        assert again == one
    assert set(found[0]) == {
        "prompt", "text", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "model",
    }  # fmt: skip
    assert found[0]["model"] == "tiny step-12"


def test_one_seed_and_several_stories_count_up_to_the_greatest_seed(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lines(capsys, "--model", model, "--max-tokens", 3, "--n", 3, "--seed", 2**63 - 2)
    assert [one["seed"] for one in found] == [2**63 - 2, 2**63 - 1, 0]


def typed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_interactive_goes_on_after_a_prompt_that_is_too_long(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, b"The cat\n" + b"x" * 64 + b"\nTom\n")
    options = ["--model", model, "--max-tokens", "12", "--seed", "3"]
    assert generate.main([*options, "--interactive"]) == 0
    out, error = capsys.readouterr()
    assert error == "error: the prompt has 64 tokens and the context of this model holds 63: shorten it\n"
    assert generate.main([*options, "--prompt", "The cat"]) == generate.main([*options, "--prompt", "Tom"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(("content", "message"), [(b"\xff\n", "standard input is no utf-8 text"), (None, "closed")])
def test_interactive_without_text_to_read_is_one_line(
    model: str, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if content is None:
        monkeypatch.setattr(sys, "stdin", None)
    else:
        typed(monkeypatch, content)
    assert generate.main(["--model", model, "--interactive"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def api(model: str) -> Iterator[FastAPI]:
    rollout = Rollout(LoadedModel(resolve_model(model), max_slots=4))
    yield create_api(rollout)
    asyncio.run(rollout.close())


def ask(api: FastAPI, path: str, **body: Any) -> dict[str, Any]:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return await client.post(path, json=body)

    answer: dict[str, Any] = asyncio.run(run()).json()
    return answer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 0},
        {"temperature": 1, "top_k": 7, "top_p": 0.8},
        {"top_k": 0, "top_p": 0.6, "repetition_penalty": 1.5},
        {"top_k": 0, "min_p": 0.4, "presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"stop": ["a", "e"], "temperature": 1},
    ],
)
def test_a_story_is_the_servers_for_the_same_seed(
    model: str, api: FastAPI, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name, value in options.items() for word in (f"--{name}", *(value if name == "stop" else [value]))]
    (ours,) = lines(capsys, "--model", model, "--prompt", "The cat", "--max-tokens", 40, "--seed", 11, *words)
    theirs = ask(api, "/generate", prompt="The cat", max_tokens=40, seed=11, **options)
    assert "The cat" + ours["text"] == theirs["story"]
    assert ours["finish_reason"] == theirs["finish_reason"]
    assert ours["prompt_tokens"] == theirs["usage"]["prompt_tokens"]
    assert ours["completion_tokens"] == theirs["usage"]["completion_tokens"]
    assert ours["model"] == "{name} {version}".format(**theirs["model"])


def test_stories_of_several_prompts_are_the_servers_too(
    model: str, api: FastAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["The cat", "Tom", ""]
    ours = lines(
        capsys, "--model", model, "--n", 2, "--max-tokens", 20, "--seed", 5, "--top-k", 0, "--temperature", 1,
        "--prompt", *prompts,
    )  # fmt: skip
    theirs = ask(api, "/v1/completions", model="tiny", prompt=prompts, n=2, max_tokens=20, seed=5)
    assert [one["text"] for one in ours] == [choice["text"] for choice in theirs["choices"]]


def test_ctrl_c_ends_with_what_was_written(tmp_path: Path) -> None:
    folder = write_endless_model(tmp_path / "endless")
    command = [
        sys.executable, str(ROOT / "slm_ray" / "generate.py"), "--model", str(folder), "--max-tokens", "1000000",
        "--prompt", "The cat", "Tom", "--rows", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    try:
        shown = b""
        while len(shown) < 40:  # text comes while the story is being written
            part = os.read(process.stdout.fileno(), 4096)
            assert part, "it ended before it wrote"
            shown += part
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert error.endswith(b"interrupted\n") and error.count(b"\n") == 1
    assert (shown + rest).startswith(b"The cat") and (shown + rest).endswith(b"\n")


def test_of_many_prompts_only_the_bytes_are_in_memory(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"The cat\n" * 200_000)
    tracemalloc.start()
    try:
        found = PromptFile(str(tmp_path / "p.txt"))
        assert len(found) == 200_000
        last = collections.deque(found, maxlen=1)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (last.text, last.line) == ("The cat", 200_000)
    assert peak < 2 * 200_000 * 8 + 2**20  # the file, read up to a bound


def test_a_file_of_prompts_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "MAX_BYTES", 2**20)
    (tmp_path / "p.txt").write_bytes(b"x" * 2**20)
    assert len(PromptFile(str(tmp_path / "p.txt"))) == 1
    (tmp_path / "p.txt").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(UserError, match=r"p.txt has more than 1 MiB of prompts: split it$"):
        PromptFile(str(tmp_path / "p.txt"))


def test_few_of_many_stories_are_in_line_at_a_time_and_a_file_is_told_of(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting: list[int] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: waiting.append(len(self._line.waiting)) or step(self))
    monkeypatch.setattr(generate, "PROGRESS_S", 0.0)
    (tmp_path / "p.txt").write_text("The cat\nTom\n" * 60)
    words = ["--model", model, "--prompts", str(tmp_path / "p.txt"), "--max-tokens", "1", "--rows", "2", "--json"]
    assert generate.main([*words, "--seed", "1"]) == 0
    out, said = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["The cat", "Tom"] * 60
    assert max(waiting) <= 2 * generate.STORIES_A_ROW
    assert "119 of 120 stories are written" in said
    monkeypatch.setattr(generate, "PROGRESS_S", 30.0)
    assert generate.main([*words, "--seed", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_a_prompt_far_behind_that_is_too_long_is_said_before_anything_is_written(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("The cat\n" * 20 + "The cat sat. " * 100)
    words = ["--model", model, "--prompts", str(tmp_path / "p.txt"), "--max-tokens", "1", "--rows", "1"]
    assert generate.main(words) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert f"{tmp_path / 'p.txt'}, line 21: " in error

"""What stands before and after a text, by the files of a model that others made."""

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from slm_ray.errors import UserError
from slm_ray.model_files.foreign_tokenizer import read_tokenizer
from tests.support.foreign_models import gpt_tokenizer, llama_tokenizer, qwen_tokenizer

QWEN_ENDS = {"bos_token_id": 400, "eos_token_id": [402, 400]}


def write(folder: Path, tokenizer: tokenizers.Tokenizer, **configs: Mapping[str, Any]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def borders(folder: Path) -> tuple[int, int, set[int]]:
    found = read_tokenizer(folder).borders
    return found.start_id, found.eos_id, set(found.stop_ids)


def without_post_processor(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    content = json.loads(tokenizer.to_str()) | {"post_processor": None}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def test_the_post_processor_puts_the_token_before_a_text(tmp_path: Path) -> None:
    folder = write(tmp_path, llama_tokenizer(), config={"bos_token_id": 5, "eos_token_id": 2})
    assert borders(folder) == (1, 2, {1, 2})
    assert read_tokenizer(folder).borders.origin == (
        "<s> (post-processor of tokenizer.json) before each text, </s> (eos_token_id of config.json) after it"
    )


@pytest.mark.parametrize(
    "configs, expected",
    [
        ({"config": {"bos_token_id": 1, "eos_token_id": 2}}, (1, 2, {1, 2})),
        ({"config": {"bos_token_id": 7, "eos_token_id": 7}, "generation_config": {"eos_token_id": 2}}, (7, 2, {2, 7})),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, (1, 2, {1, 2})),
        (
            {
                "config": {"bos_token_id": 7, "eos_token_id": 2},
                "tokenizer_config": {"bos_token": "<s>", "add_bos_token": True},
            },
            (1, 2, {1, 2}),
        ),
        (
            {
                "config": {"bos_token_id": 7, "eos_token_id": 2},
                "tokenizer_config": {"bos_token": "<s>", "add_bos_token": False},
            },
            (7, 2, {2, 7}),
        ),
        ({"config": {"eos_token_id": 2}}, (2, 2, {2})),
        ({"config": {"bos_token_id": 1}}, (1, 1, {1})),
        ({"config": {"bos_token_id": 50256, "eos_token_id": [50256, 2]}}, (2, 2, {2})),
        (
            {"config": {"bos_token_id": None, "eos_token_id": True}, "generation_config": {"eos_token_id": 2}},
            (2, 2, {2}),
        ),
    ],
)
def test_without_one_the_configs_say_it(tmp_path: Path, configs: dict[str, Any], expected: object) -> None:
    assert borders(write(tmp_path, without_post_processor(llama_tokenizer()), **configs)) == expected


def test_a_list_of_ends_ends_what_is_written_and_a_document_ends_as_it_begins(tmp_path: Path) -> None:
    assert borders(write(tmp_path, qwen_tokenizer(), generation_config=QWEN_ENDS)) == (400, 400, {400, 402})


@pytest.mark.parametrize("configs", [{}, {"config": {"eos_token_id": 10**12}}, {"config": {"eos_token_id": "</s>"}}])
def test_a_folder_that_names_no_end_is_refused(tmp_path: Path, configs: dict[str, Any]) -> None:
    folder = write(tmp_path, without_post_processor(llama_tokenizer()), **configs)
    with pytest.raises(UserError, match="names no end-of-text token: set eos_token_id"):
        read_tokenizer(folder)


def test_more_than_one_token_before_a_text_is_refused(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer()
    twice = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> </s> $A", special_tokens=twice)
    with pytest.raises(UserError, match="puts 2 tokens before a text"):
        read_tokenizer(write(tmp_path, tokenizer, config={"eos_token_id": 2}))


def test_text_that_looks_like_a_special_token_stays_text(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write(tmp_path, qwen_tokenizer(), generation_config=QWEN_ENDS))
    assert not set(tokenizer.encode("<|im_end|><|endoftext|>")) & tokenizer.stop_ids


def test_a_tokenizer_with_holes_knows_them(tmp_path: Path) -> None:
    content = json.loads(gpt_tokenizer().to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": 403, "content": "<far>", **flags})
    content["model"]["vocab"]["<far>"] = 403
    folder = write(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(content)), config={"eos_token_id": 0})
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.holes.tolist()) == (404, [400, 401, 402])


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def in_order(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(replacement: str) -> dict[str, Any]:
    """A step that writes `replacement` for each `a`: a double array with one leaf, as sentencepiece makes them."""
    units = [0] * 512
    units[0] = 1 << 10  # the root: its children stand at 1 ^ label
    units[1 ^ ord("a")] = 256 << 10 | 1 << 8 | ord("a")  # has a leaf, at its own place ^ 256
    units[(1 ^ ord("a")) ^ 256] = 1 << 31  # text 0
    table = struct.pack("<512I", *units)
    content = struct.pack("<I", len(table)) + table + replacement.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def with_part(folder: Path, part: str, content: dict[str, Any]) -> Path:
    write(folder, gpt_tokenizer(), config={"eos_token_id": 0})
    whole = json.loads((folder / "tokenizer.json").read_text()) | {part: content}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


REPLACE = replace("a", "a" * 10)
HONEST = [replace("\u2026", "..."), replace("\u2014", " -- "), replace("\u00bd", "1/2"), replace("\u20ac", "EUR")]
LONGEST_NFKC = "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647 \u0639\u0644\u064a\u0647 \u0648\u0633\u0644\u0645"


@pytest.mark.parametrize(
    "part, content",
    [
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 9}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 3}] * 3}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 1000}),
        ("normalizer", {"normalizers": [REPLACE | {"content": "a" * 101}], "type": "Sequence"}),
        ("normalizer", in_order(charsmap("a" * 1000), charsmap("a" * 1000))),
        ("normalizer", in_order(charsmap("a" * 20), charsmap("a" * 20))),
        ("normalizer", in_order(charsmap("b" * 20), replace("b", "c" * 20))),
        ("normalizer", in_order(replace("x", "y" * 20), {"type": "NFC"}, replace("y", "z" * 20))),
        ("normalizer", in_order(replace("x", "\ufdfa" * 9), {"type": "NFKC"})),
        ("normalizer", in_order(*[replace("(?=q)", "q", "Regex")] * 10)),
        ("normalizer", in_order(*[replace("", "q", "Regex")] * 10)),
        ("decoder", {"type": "Sequence", "decoders": [REPLACE] * 9}),
    ],
)
def test_a_tokenizer_that_fills_the_memory_with_one_letter_is_refused(
    tmp_path: Path, part: str, content: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"its {part} makes a text .* times as long, and 100 is the most"):
        read_tokenizer(with_part(tmp_path, part, content))


@pytest.mark.parametrize(
    "content",
    [
        in_order(*HONEST, {"type": "NFC"}),
        in_order({"type": "NFKC"}, *HONEST * 20, replace("\n", "<newline>")),
        in_order({"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")),
        in_order(charsmap(LONGEST_NFKC), *[replace(" {2,}", " ", "Regex")] * 20, *HONEST),
        in_order(replace("\n", "<newline>"), replace("<newline>", "\n" * 9)),
    ],
)
def test_rules_that_do_not_read_one_another_are_not_multiplied(tmp_path: Path, content: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(with_part(tmp_path, "normalizer", content))
    assert len(tokenizer.encode("\u2026 half a page")) > 0


def test_rules_that_would_take_too_long_to_measure_are_refused(tmp_path: Path) -> None:
    rules = [replace(chr(0x4E00 + number), "a") for number in range(3000)]
    with pytest.raises(UserError, match="its normalizer has too many rules one behind another"):
        read_tokenizer(with_part(tmp_path, "normalizer", in_order(*rules)))


def test_dropout_of_a_tokenizer_is_left_out(tmp_path: Path) -> None:
    content = json.loads(gpt_tokenizer().to_str())
    content["model"]["dropout"] = 0.9
    folder = write(tmp_path, gpt_tokenizer(), config={"eos_token_id": 0})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(folder)
    assert len({tuple(tokenizer.encode("Once upon a time there was")) for _ in range(8)}) == 1

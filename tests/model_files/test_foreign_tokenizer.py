"""What stands before and after a text, by the files of a model that others made."""

import json
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


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}


@pytest.mark.parametrize(
    "part, content",
    [
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 9}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 3}] * 3}),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 1000}),
        ("decoder", {"type": "Sequence", "decoders": [REPLACE] * 9}),
    ],
)
def test_a_tokenizer_that_fills_the_memory_with_one_letter_is_refused(
    tmp_path: Path, part: str, content: dict[str, Any]
) -> None:
    folder = write(tmp_path, gpt_tokenizer(), config={"eos_token_id": 0})
    whole = json.loads((folder / "tokenizer.json").read_text()) | {part: content}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match=f"its {part} makes a text .* times as long, and 100 is the most"):
        read_tokenizer(folder)


def test_dropout_of_a_tokenizer_is_left_out(tmp_path: Path) -> None:
    content = json.loads(gpt_tokenizer().to_str())
    content["model"]["dropout"] = 0.9
    folder = write(tmp_path, gpt_tokenizer(), config={"eos_token_id": 0})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(folder)
    assert len({tuple(tokenizer.encode("Once upon a time there was")) for _ in range(8)}) == 1

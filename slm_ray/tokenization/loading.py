"""What `--tokenizer` names: a `tokenizer.json`, a folder with one, a SentencePiece `.model`, `gpt2`, `hub:NAME`.

In: a name. Out: a `Tokenizer` that keeps every text and has an end-of-text token.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError, one_line, reason
from slm_ray.hub_reference import ANSWER_TIMEOUT_S, PREFIX, parse_hub_reference
from slm_ray.storage import StoragePath, read_at_most, storage_path
from slm_ray.tokenization.from_sentencepiece import convert
from slm_ray.tokenization.tokenizer import END_OF_TEXT, MAX_TOKENIZER_BYTES, Tokenizer, parsed

GPT2 = f"{PREFIX}openai-community/gpt2"
_TOKENIZER_FILE = "tokenizer.json"


def open_tokenizer(where: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` names: a file, a folder, a `.model`, `gpt2`, or `hub:NAME[@REVISION]`.

    A file without the special token `<|endoftext|>` gets it as its next id; other special tokens it may have
    keep their ids and are never used.

    Raises:
        UserError: it is not available or cannot be read, does not keep every text, or has no room for an end-of-text
            token.
    """
    path = _found(where)
    content = _read(path)
    text = convert(content, where) if path.suffix == ".model" else content.decode("utf-8", errors="replace")
    return Tokenizer.from_json(with_end_of_text(text, where), where, must_keep_text=True)


def _found(where: str) -> StoragePath:
    """The file that the name stands for."""
    if not where:
        raise UserError("a tokenizer is an empty word: name a file, a folder, gpt2 or hub:NAME")
    if where.startswith(PREFIX):
        return _download(where)
    try:
        path = storage_path(where) if "://" in where else Path(where).expanduser()
        if where == "gpt2" and not path.exists():
            return _download(GPT2)
        return path / _TOKENIZER_FILE if path.is_dir() else path
    except UserError:
        raise
    except Exception as error:  # a name that is too long, ~name of nobody; each object store has errors of its own
        raise UserError(f"cannot read the tokenizer {where}: {one_line(error)}") from error


def with_end_of_text(text: str, name: str = "tokenizer") -> str:
    """A `tokenizer.json` that has `<|endoftext|>` as a special token; unchanged if it has.

    An entry of that name keeps its id and becomes special; otherwise the next free id is taken. A special token
    of another name (`</s>`) is left alone: the end-of-text token has one name in every data set.

    Raises:
        UserError: it is no tokenizer file, or its ids have holes where the end-of-text token would go.
    """
    inner = parsed(text, name)
    config = json.loads(text)
    named = [token for token in config.get("added_tokens") or [] if token["content"] == END_OF_TEXT]
    if named:
        named[0]["special"] = True
        return json.dumps(config, ensure_ascii=False)
    taken = inner.get_vocab(with_added_tokens=True)
    inner.add_special_tokens([END_OF_TEXT])
    if END_OF_TEXT not in taken and inner.token_to_id(END_OF_TEXT) in taken.values():
        raise UserError(
            f"cannot add {END_OF_TEXT} to {name}: its ids have holes (they reach {max(taken.values())}, but it has "
            f"{len(taken)} entries); number them from 0 without holes, or leave out --tokenizer to train one"
        )
    return str(inner.to_str())


def _download(word: str) -> Path:
    """The `tokenizer.json` of a model of the hub; without an answer, the copy that the hub's client keeps."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    named = parse_hub_reference(word)
    if named is None or named.split:
        raise UserError(f"{word} is not a tokenizer of the hub: expected hub:OWNER/NAME[@REVISION]")
    file: dict[str, Any] = {"repo_id": named.name, "filename": _TOKENIZER_FILE, "revision": named.revision}
    try:
        get_hf_file_metadata(hf_hub_url(**file), timeout=ANSWER_TIMEOUT_S)  # one question; the download asks for 24 s
        return Path(hf_hub_download(**file))
    except Exception as error:  # every layer below has its own family of exceptions
        with contextlib.suppress(Exception):
            return Path(hf_hub_download(**file, local_files_only=True))
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"cannot get the tokenizer {word} ({why}): give a file, try again with a network, "
            "or leave out --tokenizer to train one"
        ) from error


def _read(path: StoragePath) -> bytes:
    try:
        return read_at_most(path, MAX_TOKENIZER_BYTES)
    except Exception as error:  # each object store has errors of its own
        raise UserError(
            f"cannot read the tokenizer {path}: {reason(error)}; give a tokenizer.json, a folder that holds one, "
            "a SentencePiece .model, gpt2 or hub:NAME"
        ) from error

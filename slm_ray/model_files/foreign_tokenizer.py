"""The tokenizer of a model that others made: its own `tokenizer.json`, and what stands before and after a text.

In: the folder of a model. Out: a `Tokenizer` with the borders that the folder's files name. Before a text stands one
token: the one that the post-processor of `tokenizer.json` puts there, else the BOS of `tokenizer_config.json` (where
`add_bos_token` is true) or of the configs, else the end-of-text token, which in the training of GPT-2 and its like
stood before every text. A text ends with the EOS, and a model that writes its BOS has begun another text.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from slm_ray.errors import UserError
from slm_ray.model_files.folders import CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, model_file, needed_file
from slm_ray.model_files.json_files import read_json
from slm_ray.model_files.text_growth import GrowthError, check_growth
from slm_ray.storage import read_at_most
from slm_ray.tokenization.tokenizer import MAX_TOKENIZER_BYTES, TextBorders, Tokenizer, TokenizerError, parsed

PADDING_ROWS = 1024
"""Rows of an embedding beyond the tokenizer's entries that are taken for padding, or an eighth of all."""
_PROBE = "a"
_Named = tuple[int, str]  # a token's id, and who named it


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in the folder of a model.

    Raises:
        UserError: it is missing, no tokenizer file, or the folder names no token that ends a text.
    """
    try:
        path = needed_file(folder, TOKENIZER, "AutoTokenizer.from_pretrained(...).save_pretrained(DIR) writes it")
        content = read_at_most(path, MAX_TOKENIZER_BYTES)
        configs = {name: _optional(folder, name) for name in (GENERATION_CONFIG, CONFIG, TOKENIZER_CONFIG)}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model: {error}") from error
    inner = parsed(_checked(content.decode("utf-8", errors="replace"), path), str(path))
    return Tokenizer(inner, str(path), _borders(inner, configs, folder))


def check_vocabulary(tokenizer: Tokenizer, rows: int, where: Path) -> None:
    """Compare a tokenizer with the rows of a model's embedding; a few more of these are padding, and never written.

    Raises:
        UserError: a token has no row, or the tokenizer leaves so many without a token that it is another model's.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{where / TOKENIZER} has the token {tokenizer.vocab_size - 1} and the vocabulary of its model ends at "
            f"{rows - 1}: they are not of one another"
        )
    if rows - tokenizer.vocab_size > max(PADDING_ROWS, rows // 8):
        raise UserError(
            f"{where / TOKENIZER} has {tokenizer.vocab_size} entries and its model {rows}: they are not of one another"
        )


def _optional(folder: Path, name: str) -> dict[str, Any]:
    path = model_file(folder, name)
    return {} if path is None else read_json(path)


def _checked(text: str, path: Path) -> str:
    """What the package may read. BPE dropout is left out: it is a matter of training, and with it a text is encoded in
    another way each time.

    Raises:
        UserError: it is no JSON, or its normaliser or decoder makes a long text of a short one.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a tokenizer.json of the `tokenizers` package: {error}") from error
    try:
        check_growth(content if isinstance(content, dict) else {})
    except GrowthError as error:
        raise UserError(f"{path}: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model.get("dropout"):
        return text
    model["dropout"] = None
    return json.dumps(content, ensure_ascii=False)


def _borders(inner: Any, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> TextBorders:
    known = set(inner.get_vocab(with_added_tokens=True).values())
    stops = [found for found in _stops(inner, configs) if found[0] in known]
    start = next((found for found in _starts(inner, configs, folder) if found[0] in known), None)
    if start is None and not stops:
        raise UserError(f"{folder} names no end-of-text token: set eos_token_id in {GENERATION_CONFIG}")
    start = start or (stops[0][0], f"{stops[0][1]}, for want of a BOS")
    stops = stops or [(start[0], f"{start[1]}, for want of an EOS")]
    ids = [token for token, _ in stops]
    end = start if start[0] in ids else stops[0]
    shown = {token: inner.id_to_token(token) for token in (start[0], end[0])}
    return TextBorders(
        start_id=start[0],
        eos_id=end[0],
        stop_ids=frozenset({*ids, start[0]}),
        origin=f"{shown[start[0]]} ({start[1]}) before each text, {shown[end[0]]} ({stops[0][1]}) after it",
    )


def _stops(inner: Any, configs: Mapping[str, Mapping[str, Any]]) -> list[_Named]:
    """The end-of-text tokens of the first file that names any."""
    for name in (GENERATION_CONFIG, CONFIG):
        value = configs[name].get("eos_token_id")
        if ids := [token for token in (value if isinstance(value, list) else [value]) if _is_id(token)]:
            return [(token, f"eos_token_id of {name}") for token in ids]
    token = _named_token(inner, configs[TOKENIZER_CONFIG].get("eos_token"))
    return [] if token is None else [(token, f"eos_token of {TOKENIZER_CONFIG}")]


def _starts(inner: Any, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[_Named]:
    """Who names the token before a text, first who counts first."""
    given = configs[TOKENIZER_CONFIG]
    if (token := _prepended(inner, folder)) is not None:
        yield token, f"post-processor of {TOKENIZER}"
    named = _named_token(inner, given.get("bos_token"))
    if named is not None and given.get("add_bos_token") is True:
        yield named, f"add_bos_token of {TOKENIZER_CONFIG}"
    for name in (GENERATION_CONFIG, CONFIG):
        value = configs[name].get("bos_token_id")
        if _is_id(value):
            yield value, f"bos_token_id of {name}"
    if named is not None:
        yield named, f"bos_token of {TOKENIZER_CONFIG}"


def _prepended(inner: Any, folder: Path) -> int | None:
    """What the post-processor puts before a text. Raises: UserError where that is more than one token."""
    try:
        whole = inner.encode(_PROBE, add_special_tokens=True).ids
        bare = inner.encode(_PROBE, add_special_tokens=False).ids
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{folder / TOKENIZER} cannot encode {_PROBE!r}: {error}") from error
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    if not bare or not starts or not starts[0]:
        return None
    if starts[0] > 1:
        raise UserError(f"{folder / TOKENIZER} puts {starts[0]} tokens before a text, and one is what is read here")
    return int(whole[0])


def _named_token(inner: Any, value: object) -> int | None:
    """The id of a token that is named as `"<s>"` or as `{"content": "<s>"}`."""
    content = value.get("content") if isinstance(value, dict) else value
    token = inner.token_to_id(content) if isinstance(content, str) else None
    return None if token is None else int(token)


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)

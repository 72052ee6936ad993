"""What a card holds: who the model is, what it was measured on, every number, the stories that it wrote.

In: a model's folder, a data set, how many beginnings. Out: plain values with the digest of all of them. It names no
place of its maker.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm_ray.config.mixtures import Mixtures
from slm_ray.corpus.consistency import THREAD_CHECK
from slm_ray.dataset.licences import UNKNOWN, licence_of
from slm_ray.errors import UserError
from slm_ray.evaluation.card.machine import machine_kind
from slm_ray.evaluation.card.published import PUBLISHED
from slm_ray.evaluation.measurement import Data, Subject, check_tokenizer, measure
from slm_ray.evaluation.writing import WrittenStory
from slm_ray.evaluation.written import Written, score, write_and_score
from slm_ray.model.decoder import count_parameters
from slm_ray.runs.checkpoint import MODEL, load_model, load_state
from slm_ray.runs.verification import file_digest
from slm_ray.storage import json_sha256
from slm_ray.tracking.registry import resolved_model

FORMAT_VERSION = 1
DIGEST = "sha256"
Card = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CardSubject:
    """A model that gets a card, with its identity."""

    found: Subject
    identity: dict[str, Any]


@contextmanager
def card_subject(reference: str, tracking_uri: str = "") -> Iterator[CardSubject]:
    """Open a model by its reference, for the length of a block.

    Raises:
        UserError: it is missing, corrupt, or an exported folder, which has no digests.
    """
    with resolved_model(reference, tracking_uri) as resolved:
        if resolved.is_foreign:
            raise UserError(
                f"{reference} is a model without digests (of others, or exported): a card is of a checkpoint"
            )
        folder = Path(resolved.path)
        model, tokenizer = load_model(folder)
        state = load_state(folder)
        name = f"{resolved.name} {resolved.version}"
        identity = {
            "name": name,
            "step": state.step,
            "parameters": count_parameters(model),
            "config": dataclasses.asdict(model.config),
            "weights_sha256": file_digest(folder, f"{MODEL}/model.safetensors"),
            "tokenizer_sha256": tokenizer.sha256,
            "trained_on": [list(part) for part in state.data_lineage],
            **({"mixtures": _nameless(state.mixtures)} if state.mixtures else {}),
        }
        found = Subject(name=name, model=model, tokenizer=tokenizer)
        yield CardSubject(found=found, identity=identity)


def make_card(subject: CardSubject, data: Data, n_beginnings: int, threads: int) -> Card:
    """Measure a model and let it write; `threads` is the number that computes now.

    Raises:
        UserError: the data was prepared with another tokenizer, has no training stories, or is damaged.
    """
    check_tokenizer(subject.found, data)
    if not data.manifest.splits["train"].rows:
        raise UserError(f"{data.folder} has no training stories: a card says what is copied from them")
    written = write_and_score(subject.found, data, n_beginnings)
    return _with_digest(_content(subject, data, written, n_beginnings, threads))


def scored_again(subject: CardSubject, data: Data, card: Mapping[str, Any]) -> dict[str, Any]:
    """The part `writing` of a card, its scores computed from the stories that stand in it.

    Raises:
        UserError: as `make_card`.
        KeyError, TypeError, ValueError: what stands there are no stories.
    """
    stories = [WrittenStory(**{**story, "tokens": tuple(story["tokens"])}) for story in card["writing"]["stories"]]
    written = score(stories, subject.found, data, card["made_with"]["beginnings"])
    return _writing(written)


def digest(card: Mapping[str, Any]) -> str:
    """sha256 of all of a card but its digest."""
    return json_sha256({name: value for name, value in card.items() if name != DIGEST})


def _with_digest(content: Card) -> Card:
    return {**content, DIGEST: json_sha256(content)}


def _content(subject: CardSubject, data: Data, written: Written, n_beginnings: int, threads: int) -> Card:
    measured = measure(subject.found, data)
    summary = measured.summary()
    for name in ("model", "split", "data_fingerprint", "stories", "tokens", "bytes"):
        del summary[name]
    tables = {
        name: [{key: value for key, value in row.items() if key != "data_set"} for row in rows]  # a folder's name
        for name, rows in measured.tables().items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "model": subject.identity,
        "data": {
            "fingerprint": data.manifest.fingerprint,
            "licence": licence_of(data.manifest) or UNKNOWN,
            "split": data.split,
            "stories": measured.n_stories,
            "tokens": measured.n_tokens,
            "bytes": measured.n_bytes,
            "training_stories": data.manifest.splits["train"].rows,
            "training_tokens": data.manifest.splits["train"].tokens,
        },
        "made_with": {
            "machine": machine_kind(threads),
            "beginnings": n_beginnings,
            **({"thread_check": THREAD_CHECK} if data.is_sample_corpus else {}),
        },
        "loss": summary | tables,
        "writing": _writing(written),
        "published": PUBLISHED,
    }


def _nameless(mixtures: Mixtures) -> dict[str, list[list[Any]]]:
    """Fingerprint and weight of each data set of a mixture."""
    return {mark: [[one.fingerprint, one.weight] for one in shares] for mark, shares in mixtures.items()}


def _writing(written: Written) -> dict[str, Any]:
    stories = [dataclasses.asdict(story) | {"tokens": list(story.tokens)} for story in written.stories]
    return written.to_record() | {"stories": stories}

"""Measure a model on a split: `python slm_ray/evaluate.py`.

In: a model reference and a prepared data set. Out: nats a token, bits per byte and perplexity, as a table for a person
on standard error and as one JSON object for a program on standard output; with `--against` how it differs from another.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.evaluate")

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.config.devices import DeviceName
from slm_ray.config.measures import Measure, Split
from slm_ray.config.options import parse
from slm_ray.errors import UserError
from slm_ray.evaluation.output_places import check_file
from slm_ray.evaluation.summary_text import measurement_text
from slm_ray.generation.backend import BackendName
from slm_ray.lineage.explain import explanation
from slm_ray.tracking.mlflow_runs import resolve_uri

if TYPE_CHECKING:  # with torch, which `--help` and a wrong option need not wait for
    from slm_ray.evaluation.card.verification import Verdict
    from slm_ray.evaluation.measurement import Measurement
    from slm_ray.evaluation.written import Written


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on a split of a data set, each token once."""

    model: str = "models:/tinystories@champion"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION), folder of a checkpoint, or a Llama, Qwen3, GPT-2
    or GPT-Neo that others made: its folder, or hub:OWNER/NAME[@REVISION]."""
    data: str = "data/tinystories"
    """Folder of the data set, prepared with the model's tokenizer; for a model that others made it is encoded anew. Of
    a mixture, A=0.7 B=0.3, the stories of all its data sets count, each once."""
    split: Split = "validation"
    """Which split."""
    measure: Measure = "stories"
    """stories: each with its own beginning as context, longer ones in windows that overlap by half, as training
    validates; windows: of the stream of tokens, cut anywhere."""
    against: str = ""
    """Another model, compared on the same stories, also where its tokenizer is another."""
    backend: BackendName = "torch"
    """What computes: torch in fp32, or a backend of the server, to see what its numbers lose."""
    device: DeviceName = "cpu"
    """Where torch computes. A GPU is faster and gives other last digits; auto takes one where there is one."""
    threads: int = 0
    """Threads that compute; 0 takes one a core. Losses by torch do not depend on it, to the last digit."""
    writing: bool = False
    """Let the model write stories, and score these too."""
    beginnings: int = 40
    """Held-out stories of which the model is given the beginning to go on, at least 1; a fixed list comes on top."""
    card: str = ""
    """Folder to write: the model's card as JSON, Markdown and HTML, its writing scored too."""
    verify: str = ""
    """A card (its folder or card.json), to be computed again from the model and the data: equal, or which number is not
    (exit code 1)."""
    sign: str = ""
    """Private key (elliptic curve, PEM) that signs the folder of --card."""
    signed_by: str = ""
    """Public key: --verify then asks first whether its owner signed the card's folder."""
    json: bool = False
    """Print one JSON object with all tables, and nothing for a person."""
    picture: str = ""
    """PNG file to write: loss by position and by length of story."""
    tracking_uri: str = ""
    """MLflow store of registered models; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given."""
    promote: bool = False
    """Make the model, a registered version, the champion if it is better beyond doubt on the split (`--split test`
    where no choice hung on it), and the server would compute what was trained; else it becomes the challenger (1)."""
    rollback: bool = False
    """Give the champion's place back to the version that had it before; measures nothing."""
    explain: str = ""
    """Measure nothing: say where this model comes from; `--explain MODEL --help` lists the options, --step for one."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"threads ({self.threads}) must be 0 or more")
        if self.beginnings < 1:
            raise UserError(f"beginnings ({self.beginnings}) must be at least 1")
        self._refuse_what_would_be_ignored()
        for name in ("against", "picture"):
            if getattr(self, name) and self.measure != "stories":
                raise UserError(f"--{name} needs --measure stories: the windows of the stream know no stories")

    def _refuse_what_would_be_ignored(self) -> None:
        if self.card and self.verify:
            raise UserError("--card writes a card and --verify checks one: give one of them")
        if self.sign and not self.card:
            raise UserError("--sign signs a card: give its folder with --card")
        if self.signed_by and not self.verify:
            raise UserError("--signed-by checks a card's signature: give the card with --verify")
        if self.beginnings != EvaluateConfig.beginnings and not (self.writing or self.card or self.verify):
            raise UserError("--beginnings is of the stories that a model writes: give --writing or --card")
        ways = {"card": _OF_A_CARD, "verify": _OF_A_CHECK, "promote": _OF_A_PROMOTION, "rollback": _OF_A_ROLLBACK}
        for way, known in ways.items():
            for field in dataclasses.fields(self) if getattr(self, way) else ():
                if field.name not in known and getattr(self, field.name) != field.default:
                    raise UserError(f"--{field.name.replace('_', '-')} does nothing beside --{way}: leave it out")


_OF_A_CHECK = frozenset(("model", "data", "tracking_uri", "json", "verify", "signed_by"))
_OF_A_PROMOTION = frozenset(("model", "data", "split", "tracking_uri", "json", "promote"))
_OF_A_ROLLBACK = frozenset(("model", "tracking_uri", "json", "rollback"))
_OF_A_CARD = frozenset(("model", "data", "split", "threads", "beginnings", "tracking_uri", "json", "card", "sign"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What the options asked for."""

    own: "Measurement"
    other: "Measurement | None" = None
    """Of the model that it is compared with."""
    written: "Written | None" = None

    def to_record(self, *, with_tables: bool = True) -> dict[str, Any]:
        """All of it as one object for JSON."""
        from slm_ray.evaluation.measurement import difference, finite

        values = self.own.summary() | (self.own.tables() if with_tables else {})
        if self.other is not None:
            paired = dataclasses.asdict(difference(self.own, self.other))
            values["against"] = {
                "bits_per_byte_difference": {name: finite(value) for name, value in paired.items()},
                **self.other.summary(),
            }
        if self.written is not None:
            values["writing"] = self.written.to_record()
        return values


def evaluate_model(config: EvaluateConfig) -> Found:
    """Measure the model, and the one that it is compared with.

    Raises:
        UserError: no such model or data set, another tokenizer, an empty split, a picture that could not be written, or
            a model that diverged.
    """
    from slm_ray.evaluation.measurement import Data, check_tokenizer, measure, subject
    from slm_ray.evaluation.written import write_and_score
    from slm_ray.model.device import find_device
    from slm_ray.model.threads import torch_threads

    if config.picture:
        check_file(config.picture)
    device = find_device(config.device, config.backend)
    data = Data.open(config.data, config.split)
    with torch_threads(config.threads), contextlib.ExitStack() as opened:
        found = opened.enter_context(subject(config.model, config.tracking_uri, device))
        if config.writing or not found.is_foreign:
            check_tokenizer(found, data)
        # What is not there is said before minutes of measuring.
        against = opened.enter_context(subject(config.against, config.tracking_uri, device)) if config.against else None
        own = measure(found, data, by=config.measure, backend=config.backend)
        written = write_and_score(found, data, config.beginnings) if config.writing else None
        other = measure(against, data, backend=config.backend) if against else None
    return Found(own=own, other=other, written=written)


def write_model_card(config: EvaluateConfig) -> dict[str, Any]:
    """Make the model's card, write its folder, and give what is in it.

    Raises:
        UserError: as `evaluate_model`; the data has no training stories, or the folder cannot be written.
    """
    from slm_ray.evaluation.card.content import card_subject, make_card
    from slm_ray.evaluation.card.files import check_output, write_card
    from slm_ray.evaluation.card.signature import check_private_key, sign
    from slm_ray.evaluation.measurement import Data, default_threads
    from slm_ray.model.threads import torch_threads

    folder = check_output(config.card)
    if config.sign:
        check_private_key(config.sign)
    data = Data.open(config.data, config.split)
    with torch_threads(config.threads), card_subject(config.model, config.tracking_uri) as model:
        card = make_card(model, data, config.beginnings, config.threads or default_threads())
    write_card(folder, card)
    if config.sign:
        sign(folder, config.sign)
    return card


def check_card(config: EvaluateConfig) -> "Verdict":
    """Compute a card again and compare every value, then the pages beside it.

    Raises:
        UserError: it is no card, or one of another model or data set than these; it has no signature.
    """
    from slm_ray.evaluation.card.content import card_subject
    from slm_ray.evaluation.card.files import altered_pages
    from slm_ray.evaluation.card.signature import altered_since_signed
    from slm_ray.evaluation.card.verification import Verdict, read_card, split_of, verify
    from slm_ray.evaluation.measurement import Data

    card = read_card(config.verify)
    if config.signed_by:
        found = tuple(altered_since_signed(config.verify, config.signed_by))
        if found:
            return Verdict(is_same_kind=False, n_values=0, differences=found)
    data = Data.open(config.data, split_of(card))
    with card_subject(config.model, config.tracking_uri) as model:
        verdict = verify(card, model, data)
    if verdict.differences:
        return verdict
    return dataclasses.replace(verdict, differences=tuple(altered_pages(config.verify, card)))


def _move_champion(config: EvaluateConfig) -> int:
    """Promote or roll back, and print what came of it. Returns the exit code: 1 where another stays champion."""
    from slm_ray.evaluation.promotion import promote_on
    from slm_ray.tracking.aliases import registered_name, roll_back

    if config.rollback:
        name = registered_name(config.model)
        left, back = roll_back(resolve_uri(config.tracking_uri), name)
        record: dict[str, Any] = {"name": name, "version": back, "is_champion": True, "instead_of": left}
        text = f"{name} version {back} is the champion again, in place of version {left}"
    else:
        found = promote_on(config.model, config.data, config.split, config.tracking_uri)
        record, text = found.to_record(), str(found)
    print(json.dumps(record) if config.json else text)
    return 0 if record["is_champion"] else 1


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, measure, print."""
    set_default_environment()
    if (explained := explanation(argv)) is not None:
        print(explained)
        return 0
    about = (EvaluateConfig.__doc__ or "").splitlines()[0]
    config = parse(EvaluateConfig, argv, prog="evaluate.py", about=about, default=EvaluateConfig())
    if config.promote or config.rollback:
        return _move_champion(config)
    if config.verify:
        verdict = check_card(config)
        print(json.dumps(verdict.to_record()) if config.json else verdict)
        return 1 if verdict.differences else 0
    if config.card:
        card = write_model_card(config)
        print(json.dumps(card) if config.json else f"{config.card}: {card['loss']['bits_per_byte']} bits per byte")
        return 0
    found = evaluate_model(config)
    if config.picture:
        from slm_ray.evaluation.pictures import write_picture

        write_picture(config.picture, found.own, found.other)
    if not config.json:
        print(measurement_text(found.to_record()), file=sys.stderr)
    print(json.dumps(found.to_record(with_tables=config.json), allow_nan=False))
    return 0

"""The weights that a new run begins with, where they are given: `--init-from`.

In: a reference to a model, ours or of others, and the plan of a run. Out: the run's checkpoint of step 0: these
weights, a fresh optimizer, and an `Origin` that says where they come from. From then on it is a run as any other, which
resumes without a look at the origin.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from slm_ray.config.files import flatten, from_dict, load_values
from slm_ray.config.options import take_option
from slm_ray.config.schema import ModelConfig, TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.hub_reference import PREFIX
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint, ownership
from slm_ray.runs.train_state import Origin, TrainState
from slm_ray.tokenization.extension import new_entries
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from slm_ray.tracking.registry import ResolvedModel, load_model, model_shape, resolved_model, weights_digest
from slm_ray.training.besides.origins import origin_of
from slm_ray.training.checkpointing import config_for_others
from slm_ray.training.inputs import RunPlan, chat_template, load_tokenizer
from slm_ray.training.optim import make_optimizer

FREE = ("seq_len", "vocab_size", "dropout", "init_std")
"""Of a shape, what weights leave open, or what is compared with more than one number."""
_READ, _WRITTEN = "embed_tokens.weight", "lm_head.weight"

Config = TypeVar("Config", bound=TrainConfig)


def begun_from(base: Config, config_file: str, words: Sequence[str]) -> Config:
    """The defaults of a run that begins anew: with `--init-from` among the words, or in the base, the shape of that
    model, under what `--config` gives of the shape.

    Raises:
        UserError: there is no such model, or its files do not fit each other.
    """
    given = {name: take_option(name, getattr(base, name), words)[0] for name in ("init_from", "tracking_uri")}
    if not given["init_from"]:
        return base
    with resolved_model(given["init_from"], given["tracking_uri"]) as found:
        shape = dataclasses.asdict(model_shape(found)) | {"vocab_size": 0}
    named = flatten(load_values(config_file)).items() if config_file else ()
    shape |= {name.removeprefix("model."): value for name, value in named if name.startswith("model.")}
    model = from_dict(ModelConfig, shape, f"{config_file} over {given['init_from']}")
    try:
        return dataclasses.replace(base, init_from=given["init_from"], model=model)
    except ValueError as error:
        raise UserError(f"{config_file or 'the config'} with the shape of {given['init_from']}: {error}") from error


def pinned_origin(config: TrainConfig) -> tuple[str, str]:
    """A reference to the very weights that `init_from` leads to now, for one that may move (an alias, a branch, the
    link `best`), and their sha256; both empty of a run that begins with random ones.

    Raises:
        UserError: there is no such model.
    """
    if not config.init_from:
        return "", ""
    with resolved_model(config.init_from, config.tracking_uri) as found:
        return found.pinned or str(found.path), weights_digest(found)


def check_origin(config: TrainConfig) -> None:
    """Refuse a config whose model is not that of `init_from`. Raises: UserError, also when there is no such model."""
    with resolved_model(config.init_from, config.tracking_uri) as found:
        _check_shape(config, model_shape(found))


def _check_shape(config: TrainConfig, shape: ModelConfig) -> None:
    """Raises: UserError, with each option that is not as the weights are, however it is spelled."""
    own = dataclasses.asdict(config.model.resolved)
    theirs = dataclasses.asdict(dataclasses.replace(shape, seq_len=config.model.seq_len).resolved)
    changed = [
        f"model.{name} is {own[name]} and there {value}"
        for name, value in theirs.items()
        if name not in FREE and own[name] != value
    ]
    if changed:
        raise UserError(
            f"{config.init_from} has another shape: {', '.join(changed)}: a run that begins with given weights keeps "
            "their shape; leave these options out"
        )
    if config.model.positions == "learned" and config.model.seq_len > shape.seq_len:
        raise UserError(
            f"model.seq_len ({config.model.seq_len}) is longer than the {shape.seq_len} positions that "
            f"{config.init_from} has learned: only rotary positions can be lengthened"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StartingPoint:
    """What a run begins with, fitted to its tokenizer and context; nothing of it is written yet."""

    plan: RunPlan
    model: Decoder
    tokenizer: Tokenizer
    origin: Origin

    def write(self, run_id: str) -> None:
        """Write the checkpoint of step 0, for the workers to go on from; `run_id` is the tracker's.

        Raises:
            UserError: the run's folder cannot be written to.
        """
        config, folder, fingerprint = self.plan.config, self.plan.folder, self.plan.data_fingerprint
        state = TrainState(
            step=0,
            samples_seen=0,
            seed=config.seed,
            world_size=config.worker_range[0],
            data_fingerprint=fingerprint,
            config=config_for_others(config),
            metrics=None,
            run_id=run_id,
            lineage=[(fingerprint, 0)],
            mixtures=self.plan.mixture_shares,
            origin=self.origin,
        )
        try:
            ownership.mark(folder.path)
            optimizer = make_optimizer(self.model, config.optim).state_dict()
            template = chat_template(load_manifest(config.data))
            checkpoint.save(folder.checkpoint_path(0), self.model, self.tokenizer, state, optimizer, template)
            folder.publish(0, is_best=False, keep=config.keep_checkpoints, keep_best=config.keep_best)
        except OSError as error:
            raise UserError(f"cannot write to {folder.address}: {error.strerror or error}") from error


def starting_point(plan: RunPlan) -> StartingPoint:
    """Read `init_from` for a run that has not begun.

    Raises:
        UserError: there is no such model, or it has another shape or tokenizer than the run.
    """
    config = plan.config
    tokenizer = load_tokenizer(config, load_manifest(config.data))
    with resolved_model(config.init_from, config.tracking_uri) as found:
        model, its_tokenizer = load_model(found)
        _check_shape(config, model.config)
        try:
            added = new_entries(its_tokenizer, tokenizer)
        except ValueError as error:
            raise UserError(_another_tokenizer(config, found, error)) from error
        origin = origin_of(config.init_from, found)
    changes = [*_context_changes(model.config, config.model), *_vocabulary_changes(model, its_tokenizer, added, config)]
    return StartingPoint(
        plan=plan,
        model=_fitted(model, its_tokenizer, added, config.model),
        tokenizer=tokenizer,
        origin=dataclasses.replace(origin, changes=changes),
    )


def _another_tokenizer(config: TrainConfig, found: ResolvedModel, why: ValueError) -> str:
    place = str(found.path if found.is_foreign else found.path / checkpoint.MODEL)
    if config.init_from.startswith(PREFIX):
        place = found.pinned
    return (
        f"{config.data} was prepared with another tokenizer than that of {config.init_from}: {why}; prepare it with "
        f"`python pipelines/prepare.py --tokenizer {place}`"
    )


def _context_changes(shape: ModelConfig, wanted: ModelConfig) -> list[str]:
    if shape.seq_len == wanted.seq_len:
        return []
    if wanted.seq_len > shape.seq_len:
        return [f"a context of {wanted.seq_len} tokens, of which it knows {shape.seq_len}: those beyond are new to it"]
    return [f"a context of {wanted.seq_len} tokens, of its {shape.seq_len}"]


def _vocabulary_changes(
    model: Decoder, tokenizer: Tokenizer, added: Mapping[str, int], config: TrainConfig
) -> list[str]:
    changes = []
    if added:
        names = ", ".join(sorted(added, key=added.__getitem__)[:3]) + (", ..." if len(added) > 3 else "")
        changes.append(f"{len(added)} new rows in its embedding, of tokens that only the data has ({names})")
    unused = model.config.vocab_size - max(tokenizer.vocab_size, config.model.vocab_size)
    if unused > 0:
        changes.append(f"without the last {unused} rows of its embedding, which no token has")
    return changes


def _fitted(model: Decoder, tokenizer: Tokenizer, added: Mapping[str, int], wanted: ModelConfig) -> Decoder:
    """The model with the vocabulary and the context of the run."""
    weights: dict[str, Tensor] = dict(model.state_dict())
    start, end = tokenizer.start_id, tokenizer.eos_id
    weights[_READ] = _rows(weights[_READ], tokenizer, added, wanted.vocab_size, end_of_text=start)
    written = start if wanted.tie_embeddings else end
    weights[_WRITTEN] = _rows(weights[_WRITTEN], tokenizer, added, wanted.vocab_size, end_of_text=written)
    if "embed_positions.weight" in weights:
        weights["embed_positions.weight"] = weights["embed_positions.weight"][: wanted.seq_len]
    fitted = Decoder(wanted)
    fitted.load_state_dict(weights)
    return fitted


def _rows(old: Tensor, tokenizer: Tokenizer, added: Mapping[str, int], vocab_size: int, end_of_text: int) -> Tensor:
    """An embedding or output layer, (rows, d_model), with a row for each token of the run.

    A new token begins as the mean of all, which none of the old ones is far from (Hewitt, "Initializing New Word
    Embeddings for Pretrained Language Models", 2021); the data's end-of-text token as `end_of_text`: where it is read,
    as the token before a text, for the first position of every text is that; where it is written, as the token after
    one. Tied, one row is both, and the first counts: a start that the model does not know is felt at every token of a
    text, an end that it does not expect at one.
    """
    known = old[: tokenizer.vocab_size]
    rows = known.mean(dim=0).repeat(vocab_size, 1)  # (vocab_size, d_model)
    kept = min(len(known), vocab_size)
    rows[:kept] = known[:kept]
    for entry, token in added.items():
        rows[token] = known[end_of_text] if entry == END_OF_TEXT else known.mean(dim=0)
    return rows

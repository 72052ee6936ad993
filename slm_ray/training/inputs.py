"""What a run is, and what it trains on.

In: a resolved `TrainConfig`. Out: for the driver a `RunPlan`, out of the manifest alone; for the workers `TrainInputs`,
the plan with the token streams, the argument of `loop.fit`.
"""

import contextlib
import dataclasses
import logging

from slm_ray.config.mixtures import DataShare
from slm_ray.config.schema import TrainConfig
from slm_ray.corpus.instructions import INSTRUCTION_TEMPLATE, STORY_TEMPLATE
from slm_ray.dataset.held_out import refuse_trained_on
from slm_ray.dataset.manifest import (
    TOKENIZER,
    Manifest,
    MixedManifest,
    data_sets,
    home_of,
    load_manifest,
    mixture_of,
    named_sets,
)
from slm_ray.dataset.mapping.header import StaleError
from slm_ray.dataset.mapping.mapped import make_mapped, open_split, story_index
from slm_ray.dataset.mixture import MixedSamples
from slm_ray.dataset.packing import Packing
from slm_ray.dataset.samples import SAMPLES, Samples, n_samples
from slm_ray.dataset.shards import verify_split
from slm_ray.dataset.stream import TokenStream
from slm_ray.errors import UserError
from slm_ray.runs.history import History
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.storage import StoragePath
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.tracker import Tracker

LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run before it starts: how long it is, on which data, and where it is kept."""

    config: TrainConfig
    max_steps: int
    data_fingerprint: str
    folder: RunFolder
    mixture_shares: dict[str, list[DataShare]] = dataclasses.field(default_factory=dict)
    """Of several data sets, which these are, by the fingerprint of all; empty for one."""
    pause_at: int = 0
    """Step at whose validation the run leaves off for now, to go on later; 0 for none."""

    @property
    def last_step(self) -> int:
        """Step at which it ends this time."""
        return min(self.max_steps, self.pause_at or self.max_steps)

    @property
    def history(self) -> History:
        """The run's own record."""
        return History(self.folder.path / "metrics.jsonl")

    @property
    def eval_interval(self) -> int:
        """Steps between validations, resolved."""
        return self.config.eval_interval_steps or min(500, -(-self.max_steps // 8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainInputs(RunPlan):
    """All that `fit` works on."""

    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    tracker: Tracker
    chat_template: str = STORY_TEMPLATE
    """Which prompt a model of these stories takes."""
    notes: tuple[str, ...] = ()
    """What was out of the ordinary when the data was read, a line each."""
    mixture: tuple[tuple[str, TokenStream, int], ...] = ()
    """Of several data sets, which stand in the place of `train`: name, training split, quota."""

    def samples(self) -> Samples:
        """What the run trains on. Raises: UserError when a split does not fill one sample."""
        make, seq_len, seed = SAMPLES[self.config.packing], self.config.model.seq_len, self.config.seed
        if not self.mixture:
            return make(self.train, seq_len, seed)
        names, streams, quotas = zip(*self.mixture)
        return MixedSamples(names, tuple(make(stream, seq_len, seed) for stream in streams), quotas, seed)


def plan_run(config: TrainConfig, manifest: Manifest, lease: str = "") -> RunPlan:
    """The plan of a resolved config; the run's folder is not looked into. `lease` is as for `open_run`.

    Raises:
        UserError: the data set has too few stories for one sample, or none to validate on.
    """
    return RunPlan(
        config=config,
        max_steps=check_length(config, manifest),
        data_fingerprint=manifest.fingerprint,
        folder=open_run(config.output, config.name, lease),
        mixture_shares=mixture_of(config.data, manifest),
    )


def check_length(config: TrainConfig, manifest: Manifest) -> int:
    """Optimizer steps of a run, once there is enough text for one.

    Raises:
        UserError: the data set has too few stories for one sample, or none to validate on.
    """
    if not manifest.splits["validation"].tokens:
        raise UserError(f"{config.data} has no validation stories: prepare it with a larger --validation-fraction")
    return n_steps(config, manifest)


def check_files(config: TrainConfig, manifest: Manifest) -> None:
    """Check that every file of the data set that a run reads is the one that its manifest lists, and let the tokens
    be mapped where they can be: workers find the file then.

    Raises:
        UserError: one is missing or was altered; or a data set of a mixture trains on what another holds out.
    """
    tokenizer = load_tokenizer(config, manifest)
    parts = data_sets(config.data, manifest)
    refuse_trained_on(parts)
    for folder, its_manifest in parts:
        for split in ("train", "validation"):
            verify_split(folder, split, its_manifest)
            _map(folder, its_manifest, split, tokenizer)


def _map(folder: str | StoragePath, manifest: Manifest, split: str, tokenizer: Tokenizer) -> None:
    """Let the tokens of a split be mapped, where they can be: else the workers, who hold them in memory, say so."""
    with contextlib.suppress(OSError, RuntimeError, StaleError):
        if note := make_mapped(folder, split, manifest, tokenizer.eos_id):
            LOGGER.warning(note)


def n_steps(config: TrainConfig, manifest: Manifest) -> int:
    """Optimizer steps of a run: as many as the config says, else those of its epochs over the training split.

    Raises:
        UserError: the split does not fill one sample.
    """
    parts = data_sets(config.data, manifest)
    if config.packing == "stories" and config.max_steps and all(part.splits["train"].tokens for _, part in parts):
        return config.max_steps  # any story is a sample
    samples = sum(_n_samples(config, folder, part) for folder, part in parts)
    return config.max_steps or max(1, round(config.epochs * (samples / config.batch_size)))


def _n_samples(config: TrainConfig, folder: str | StoragePath, manifest: Manifest) -> int:
    """Samples of an epoch of one data set. Raises: UserError when it does not fill one."""
    seq_len, n_tokens = config.model.seq_len, manifest.splits["train"].tokens
    if config.packing == "windows" or not n_tokens:
        return n_samples(n_tokens, seq_len)
    _map(folder, manifest, "train", load_tokenizer(config, manifest))
    return Packing(story_index(folder, "train", manifest), seq_len).n_samples


def load_inputs(config: TrainConfig, tracker: Tracker, lease: str = "") -> TrainInputs:
    """Read what a resolved config trains on; every digest of the data set is checked on the way.

    `lease` is as for `open_run`.

    Raises:
        UserError: the data set is missing, corrupt, or too small for one sample.
    """
    manifest = load_manifest(config.data)
    tokenizer = load_tokenizer(config, manifest)
    parts, notes = data_sets(config.data, manifest), list[str]()

    def opened(split: str) -> list[TokenStream]:
        found = [open_split(folder, split, part, tokenizer.eos_id) for folder, part in parts]
        notes.extend(note for _, note in found if note)
        return [stream for stream, _ in found]

    train, validation = opened("train"), opened("validation")
    plan = plan_run(config, manifest, lease)  # which need not read a file through that was opened
    quotas = [part.quota for part in manifest.parts] if isinstance(manifest, MixedManifest) else []
    names = [name for name, _, _ in named_sets(config.data, manifest)]
    plan.folder.fetch()
    return TrainInputs(
        **{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)},
        train=train[0],
        mixture=tuple(zip(names, train, quotas)),
        validation=validation[0] if len(validation) == 1 else TokenStream.joined(validation),
        notes=tuple(notes),
        tokenizer=tokenizer,
        tracker=tracker,
        chat_template=chat_template(manifest),
    )


def chat_template(manifest: Manifest) -> str:
    """Which prompt a model learns of a data set."""
    return INSTRUCTION_TEMPLATE if manifest.has_instructions else STORY_TEMPLATE


def load_tokenizer(config: TrainConfig, manifest: Manifest) -> Tokenizer:
    """The tokenizer of the data set. Raises: UserError when it is missing or not the one that the manifest lists."""
    path = home_of(config.data) / TOKENIZER
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        raise UserError(f"{path} is not the one its manifest lists: prepare the data again")
    return tokenizer

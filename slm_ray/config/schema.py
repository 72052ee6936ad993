"""What a run is: frozen dataclasses, checked once when they are made.

In: fields, from `files` or `options`. Out: a `TrainConfig`, from which all that a run does follows: every checkpoint
and the tracker hold it.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from slm_ray.config.checks import require as _require
from slm_ray.config.checks import require_positive as _require_positive
from slm_ray.config.places import model_name_fault
from slm_ray.config.shape import ModelConfig as ModelConfig  # a part of what a run is
from slm_ray.errors import UserError, visible

MAX_NAME_BYTES = 200
"""Of a run: its folder's name, with room for what is put beside it (255 is what file systems take)."""
IGNORED_TARGET = -1  # of a position that no loss counts
MIN_CONTEXT = 2
"""Tokens: with one, nothing but the token before would be seen."""
MAX_THREADS, MAX_EPOCHS, MAX_MTP_WEIGHT = 1024, 1_000_000, 1.0
PackingName = Literal["windows", "stories"]
AttentionName = Literal["all", "story"]
MeasureName = Literal["stories", "windows"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate over the run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW (arXiv:1711.05101), or Muon for the blocks' matrices with AdamW for embeddings, norms and biases."""
    lr: float = 3e-3
    """Learning rate at the end of the warmup."""
    min_lr: float | None = None
    """Learning rate at the last step, at most lr; lr / 10 when not given."""
    warmup_steps: int = 50
    """Steps of linear growth from 0 to lr; cut to a tenth of the run where that is shorter."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The way from lr down to min_lr; `constant` stays at lr until the last `decay_share` of the run."""
    decay_share: float = 0.2
    """Share of the run over which the `constant` schedule decays, linearly; above 0, at most 1."""
    embed_lr_factor: float = 1.0
    """Learning rate of embeddings and output layer, over that of the rest."""
    momentum: float = 0.95
    """Muon's decay of the mean of the gradients."""
    normalize_rows: bool = False
    """Muon brings the rows of each update to one size (NorMuon)."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices and embeddings; none on norms and biases."""
    lookahead: float = 0.0
    """Gradients are taken so many mean steps ahead, in the middle of the run (EMA-Nesterov); 0 turns it off."""
    tail_average: float = 0.0
    """Share that the mean of the last weights has in the final ones, 0 to 1; 0 turns it off."""
    beta1: float = 0.9
    """Decay of the mean of the gradients."""
    beta2: float = 0.95
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added to the root of the squares' mean."""
    clip_norm: float = 1.0
    """Largest global norm of the gradients; 0 turns clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "embed_lr_factor"):
            _require_positive(name, getattr(self, name))
        _require(
            self.min_lr is None or 0 <= self.min_lr <= self.lr,
            f"min_lr ({self.min_lr}) must be between 0 and lr ({self.lr})",
        )
        for name in ("warmup_steps", "weight_decay", "clip_norm", "lookahead"):
            _require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")
        _require(0 < self.decay_share <= 1, f"decay_share ({self.decay_share}) must be above 0 and at most 1")
        _require(0 <= self.tail_average <= 1, f"tail_average ({self.tail_average}) must be from 0 to 1")
        for name in ("beta1", "beta2", "momentum"):
            _require(0 <= getattr(self, name) < 1, f"{name} ({getattr(self, name)}) must be in [0, 1)")

    @property
    def final_lr(self) -> float:
        """Learning rate at the last step, resolved."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


_NOT_NEGATIVE = (
    *("seed", "max_steps", "threads", "eval_interval_steps", "max_failures", "patience", "hang_timeout_s"),
    "teacher_weight",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    data: str = "data/tinystories"
    """Folder of the data set, as `pipelines/prepare.py` wrote it; every worker must see it. Or several of one
    tokenizer, each with its share of the samples: A=0.7 B=0.3."""
    output: str = "runs"
    """Folder of the runs; every worker must see it."""
    name: str = ""
    """Name of the run and of its folder under output; made from the time when not given."""
    init_from: str = ""
    """Model whose weights the run begins with, and whose shape it takes: a folder (ours, or of a Llama, Qwen3, GPT-2 or
    GPT-Neo that others made), models:/NAME/VERSION or hub:OWNER/NAME; random weights when not given."""
    teacher: tuple[str, ...] = ()
    """Models of the same tokenizer, as init_from, whose opinion of every next token is learned beside the stories."""
    teacher_weight: float = 0.5
    """Weight of the teachers in the training loss, 0 to 1; the stories have the rest."""
    teacher_temperature: float = 1.0
    """Of the comparison with the teachers; above 1, unlikely tokens count for more."""
    mtp_weights: tuple[float, ...] = ()
    """Multi-token prediction: weights of the second next token, the third and so on, in the loss at the run's begin."""
    mtp_until: float = 0.6667
    """Share of the run in which the first of these falls to 0, linearly; the second does in half of it, and so on."""
    resume: bool = False
    """Continue the run NAME from its latest checkpoint (without a name: the newest run under output), or begin it."""
    force: bool = False
    """With resume: go on although the data set, the batch size or the seed is another than before."""
    workers: int | str = 0
    """Workers, one process each; 0 takes every GPU of the cluster or, without one, up to two CPU workers. MIN:MAX (in
    YAML with quotes) takes as many as there is room for, fewer when a node leaves and more when one comes."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside for each worker; a matter of scheduling only."""
    batch_size: int = 32
    """Global batch in sequences a step; divisible by workers x accumulation_steps."""
    accumulation_steps: int = 1
    """Parts in which a worker's share of the batch is computed, one after another, to save memory."""
    packing: PackingName = "windows"
    """What a sample is: windows of the stream of tokens, cut anywhere, or whole stories, as many as the context holds;
    one longer than the context goes on in another sample."""
    attention: AttentionName = "all"
    """What a token of whole stories sees: all that stands before it in the sample, or its own story alone, whose
    positions then begin at 0."""
    epochs: float = 1.0
    """Length of the run in passes over the training split, unless max_steps is given."""
    max_steps: int = 0
    """Length of the run in optimizer steps; 0 goes by epochs."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the matrix multiplications; auto is bf16 where the hardware has it, else fp32. Weights stay
    fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto uses it where a compiler is found and the run is long enough to win its time back."""
    threads: int = 0
    """CPU threads of each worker; 0 shares the node's cores among its workers."""
    log_interval_steps: int = 10
    """Steps between two lines of progress and metrics."""
    eval_interval_steps: int = 0
    """Steps between two validations, each with a checkpoint; 0 means an eighth of the run, at most 500."""
    validation: MeasureName = "stories"
    """How validation measures: stories, each with its own beginning as context, longer ones in windows that overlap by
    half, as `evaluate.py` does; or windows of the stream of tokens, cut anywhere."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the best."""
    keep_best: int = 1
    """Checkpoints of the lowest validation loss kept, besides the newest."""
    patience: int = 0
    """Validations without a lower loss after which the run ends early; 0 turns that off."""
    max_failures: int = 3
    """Restarts after the loss of a worker before the run gives up."""
    hang_timeout_s: float = 600.0
    """Seconds without any progress after which the workers start again from the last checkpoint; the first steps wait
    for the compiler. 0 waits for ever."""
    sample_prompt: str = "Once upon a time"
    """Beginning of the story sampled at each validation; empty turns it off."""
    profile: bool = False
    """Record a few steps, in profile/ of the run's folder: a trace, and the step by part, each with its share of the
    machine's peak, and by operator."""
    tensorboard: bool = False
    """Write TensorBoard's event files too, in tensorboard/ of the run's folder; needs the extra of this name."""
    wandb: bool = False
    """Record the run at Weights & Biases too (WANDB_MODE=offline: in wandb/ of the run's folder); needs the extra of
    this name."""
    tracking_uri: str = ""
    """MLflow store; MLFLOW_TRACKING_URI or sqlite:///mlflow.db when not given; `none` turns tracking off."""
    experiment: str = "slm-ray"
    """MLflow experiment."""
    register: str = ""
    """Register the best checkpoint under this name, when the run ends; the first of a name becomes its champion."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation_steps", "log_interval_steps", "keep_checkpoints", "keep_best"):
            _require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")
        for name in _NOT_NEGATIVE:
            _require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")
        _require(
            not self.is_elastic or self.max_failures > 0,
            f"workers ({self.workers}) may change by restarts only, and max_failures is 0",
        )
        _require(self.teacher_weight <= 1, f"teacher_weight ({self.teacher_weight}) must be at most 1")
        for name in ("cpus_per_worker", "epochs", "teacher_temperature", "mtp_until"):
            _require_positive(name, getattr(self, name))
        _require(
            self.attention == "all" or self.packing == "stories",
            f"attention ({self.attention}) is a matter of packing stories, and packing is {self.packing}",
        )
        _require(self.model.seq_len >= MIN_CONTEXT, f"seq_len ({self.model.seq_len}) must be at least {MIN_CONTEXT}")
        _check_further_tokens(self)
        _require(self.seed < 2**63, f"seed ({self.seed}) must be below 2^63")
        _require(
            not self.name or (Path(self.name).name == visible(self.name) and self.name not in (".", "..")),
            f"name ({self.name!r:.60}) must be a plain folder name",
        )
        _require(
            len(self.name.encode()) <= MAX_NAME_BYTES and "\0" not in self.name,
            f"name ({self.name[:20]!r}...) must be a folder name of at most {MAX_NAME_BYTES} bytes",
        )
        _require(self.threads <= MAX_THREADS, f"threads ({self.threads}) must be at most {MAX_THREADS:,}")
        _require(self.epochs <= MAX_EPOCHS, f"epochs ({self.epochs}) must be at most {MAX_EPOCHS:,}")
        _require(not (fault := model_name_fault(self.register)), f"register ({self.register!r}) {fault}")

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers: (2, 2) of `2`, (1, 4) of `1:4`."""
        return worker_range(self.workers)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        fewest, most = self.worker_range
        return fewest < most

    def check_batch(self, workers: int | str) -> None:
        """Refuse a global batch that the workers, however many there may be, cannot share out evenly.

        Raises:
            UserError: batch_size is not divisible by workers x accumulation_steps.
        """
        fewest, most = worker_range(workers)
        for count in range(fewest, most + 1):
            parts = count * self.accumulation_steps
            if self.batch_size % parts:
                raise UserError(
                    f"batch_size ({self.batch_size}) must be divisible by workers x accumulation_steps "
                    f"({count} x {self.accumulation_steps} = {parts})"
                )


def _check_further_tokens(config: TrainConfig) -> None:
    weights, seq_len = config.mtp_weights, config.model.seq_len
    for weight in weights:
        _require(0 <= weight <= MAX_MTP_WEIGHT, f"mtp_weights ({weight}) must be from 0 to {MAX_MTP_WEIGHT}")
    message = f"mtp_weights ({len(weights)} of them) must be fewer than the {seq_len} tokens of the context"
    _require(len(weights) < seq_len, message)
    _require(config.mtp_until <= 1, f"mtp_until ({config.mtp_until}) must be at most 1")


def worker_range(workers: int | str) -> tuple[int, int]:
    """Fewest and most workers that `2` or `1:4` stand for.

    Raises:
        ValueError: it is neither.
    """
    fewest, colon, most = str(workers).partition(":")
    message = f"workers ({workers}) must be a number or MIN:MAX, such as 1:2"
    try:
        low, high = int(fewest), int(most if colon else fewest)
    except ValueError as error:
        raise ValueError(message) from error
    _require(0 <= low <= high and (low > 0 or not colon), message)
    return low, high

"""What a run is given: its task, and the world around it.

In: from `preflight`, what to train on; from `train`, how the ranks hear of each other. Out: arguments of `loop.fit`.
"""

import dataclasses

from slm_ray import storage
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.batches import TokenStream, TrainBatches
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.errors import UserError
from slm_ray.runs.history import History
from slm_ray.runs.remote_run import open_run
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.tracker import Tracker


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """One run's input: all that `fit` works on."""

    config: TrainConfig
    max_steps: int
    data_fingerprint: str
    train: TokenStream
    validation: TokenStream
    tokenizer: Tokenizer
    folder: RunFolder
    tracker: Tracker

    @property
    def history(self) -> History:
        """The run's own record."""
        return History(self.folder.path / "metrics.jsonl")

    @property
    def eval_interval(self) -> int:
        """Steps between validations, resolved."""
        return self.config.eval_interval_steps or min(500, -(-self.max_steps // 8))


def load_inputs(config: TrainConfig, tracker: Tracker) -> TrainInputs:
    """Read what a resolved config trains on; every digest of the data set is checked on the way.

    Raises:
        UserError: the data set is missing, damaged, or too small for one sample.
    """
    data = storage.storage_path(config.data)
    manifest = load_manifest(data)
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    if tokenizer.sha256 != manifest.tokenizer["sha256"]:
        raise UserError(f"{data / 'tokenizer.json'} is not the one its manifest lists: prepare the data again")
    streams = {
        split: TokenStream.of_split(*read_split(data, split, manifest=manifest), tokenizer.eos_id)
        for split in ("train", "validation")
    }
    if not streams["validation"].n_targets:
        raise UserError(f"{data} has no validation stories: prepare it with a larger --validation-fraction")
    folder = open_run(config.output, config.name)
    folder.fetch()
    return TrainInputs(
        config=config,
        max_steps=config.max_steps or _steps(config, streams["train"]),
        data_fingerprint=manifest.fingerprint,
        train=streams["train"],
        validation=streams["validation"],
        tokenizer=tokenizer,
        folder=folder,
        tracker=tracker,
    )


def _steps(config: TrainConfig, stream: TokenStream) -> int:
    batches = TrainBatches.of_stream(
        stream, seq_len=config.model.seq_len, batch_size=config.batch_size, seed=config.seed, rank=0, world_size=1
    )
    return max(1, round(config.epochs * batches.steps_per_epoch))

"""Learning per token, one factor at a time: `make bench-learn DATA=data/tinystories`.

Every try trains our model on one pass (or `--share` of one, with the whole schedule) over the training split, in one
process without Ray, and is judged by bits per byte of the validation split; the test split is not touched. A try is
a change to `START`, or to another try. What every try gave is kept in `learning.md` beside this file. Sequence length
128, at most 5.3 million parameters; meant for the real sample with a vocabulary of 4,096.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from slm_ray.config.files import from_dict, load_config
from slm_ray.config.schema import TrainConfig
from slm_ray.model.decoder import parameter_count
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.hardware import resolve_compile, resolve_precision
from slm_ray.training.inputs import load_inputs
from slm_ray.training.preflight import resolve
from slm_ray.training.trainer import Trainer

MAX_PARAMETERS = 5.3e6
START = {
    "batch_size": 32,
    "model": {"seq_len": 128, "n_layers": 4, "d_model": 256, "n_heads": 8, "d_ff": 704},
    "optim": {"name": "adamw", "lr": 3e-3, "warmup_steps": 50, "weight_decay": 0.1},
}


@dataclasses.dataclass(frozen=True)
class Try:
    """A change of config, and what no field can say as a function of the trainer."""

    changes: Mapping[str, Any]
    parent: str = ""
    alter: Callable[[Trainer], None] | None = None


def zero_outputs(trainer: Trainer) -> None:
    """Let every block begin as the identity: its output projections are zero."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()


def of_preset(name: str) -> dict[str, Any]:
    """What of a preset decides how much is learned."""
    values = dataclasses.asdict(load_config(name))
    return {key: values[key] for key in ("batch_size", "model", "optim")}


def muon(**changes: Any) -> dict[str, Any]:
    """Muon at the rate that the tries were made from."""
    return {"optim": {"name": "muon", "lr": 1e-2, "embed_lr_factor": 0.6} | changes}


BASE = "muon, lr 1e-2, embeddings 0.6"
SMALL = "batch 16"
PRESET = "story-5m"
TRIES = {
    "adamw": Try({}),
    "adamw, lr 1e-3": Try({"optim": {"lr": 1e-3}}),
    "muon": Try({"optim": {"name": "muon"}}),
    BASE: Try(muon()),
    "lr 2e-2, embeddings 0.5": Try(muon(lr=2e-2, embed_lr_factor=0.5)),
    "linear to 0": Try(muon(schedule="linear", min_lr=0.0)),
    "zero output projections": Try({}, BASE, zero_outputs),
    "even rows": Try(muon(normalize_rows=True)),
    "embeddings 2": Try(muon(embed_lr_factor=2.0)),
    SMALL: Try({"batch_size": 16}, BASE),
    "batch 16, even rows, embeddings 5": Try({"optim": {"normalize_rows": True, "embed_lr_factor": 5.0}}, SMALL),
    "batch 16, even rows, embeddings 10": Try({"optim": {"normalize_rows": True, "embed_lr_factor": 10.0}}, SMALL),
    "batch 16, even rows, embeddings 20": Try({"optim": {"normalize_rows": True, "embed_lr_factor": 20.0}}, SMALL),
    PRESET: Try(of_preset(PRESET)),
    "story-5m, batch 32, four layers, cosine to a tenth": Try(
        {"batch_size": 32, "model": {"n_layers": 4}, "optim": {"schedule": "cosine", "min_lr": None}}, PRESET
    ),
    "story-5m, batch 32, four layers": Try({"batch_size": 32, "model": {"n_layers": 4}}, PRESET),
    "story-5m, batch 32": Try({"batch_size": 32}, PRESET),
    "story-5m, lr 4e-3": Try({"optim": {"lr": 4e-3}}, PRESET),
    "story-5m, lr 5e-3": Try({"optim": {"lr": 5e-3}}, PRESET),
    "story-5m, embeddings 5": Try({"optim": {"embed_lr_factor": 5.0}}, PRESET),
}


def main() -> int:
    """Run the tries that were asked for, one after another."""
    parser = argparse.ArgumentParser(prog="bench/learn.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--share", type=float, default=1.0, help="share of one epoch (default: 1)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validations", type=int, default=2, help="validations over the run (default: 2)")
    parser.add_argument("--list", action="store_true", help="name the tries and leave")
    parser.add_argument("tries", nargs="*", help="names (default: all)")
    given = parser.parse_args()
    if given.list:
        print("\n".join(TRIES))
        return 0
    print(
        "| try | parameters | steps | share of an epoch: bits per byte | nats | tokens/s |\n|---|---|---|---|---|---|"
    )
    for name in given.tries or TRIES:
        print(row(name, given), flush=True)
    return 0


def config_of(name: str, given: argparse.Namespace) -> TrainConfig:
    """The config of a try: its parents' changes first."""
    chain = [TRIES[name]]
    while chain[0].parent:
        chain.insert(0, TRIES[chain[0].parent])
    values: dict[str, Any] = START
    for one in chain:
        values = merged(values, one.changes)
    own = {"data": given.data, "seed": given.seed, "epochs": given.share, "tracking_uri": "none", "name": "try"}
    return from_dict(TrainConfig, values | own, name)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with changes over them."""
    new = dict(values)
    for key, value in changes.items():
        new[key] = merged(new.get(key, {}), value) if isinstance(value, Mapping) else value
    return new


def row(name: str, given: argparse.Namespace) -> str:
    """Train one try, and give its line of the table."""
    torch.set_num_threads(given.threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as output:
        config = resolve(dataclasses.replace(config_of(name, given), output=output), lambda _: 1)
        inputs = load_inputs(config, NullTracker())
        device = torch.device("cpu")
        precision = resolve_precision("auto", device)
        n_parameters = parameter_count(config.model)
        if n_parameters > MAX_PARAMETERS:
            raise SystemExit(f"{name}: {n_parameters:,} parameters, and at most {MAX_PARAMETERS:,.0f} are allowed")
        is_compiled = resolve_compile(config, device, n_parameters, inputs.max_steps)
        trainer = Trainer(inputs, TrainContext(), precision, is_compiled)
        alter = TRIES[name].alter
        if alter:
            alter(trainer)
        return line(name, trainer, n_parameters, given)


def line(name: str, trainer: Trainer, n_parameters: int, given: argparse.Namespace) -> str:
    """Train to the end, validating on the way."""
    max_steps, figures, seconds = trainer.inputs.max_steps, [], 0.0
    for part in range(1, given.validations + 1):
        until = round(max_steps * part / given.validations)
        started = time.perf_counter()
        while trainer.step < until:
            trainer.train_step()
        seconds += time.perf_counter() - started
        found = trainer.validate()
        figures.append(f"{given.share * part / given.validations:.3g}: {found.val_bits_per_byte:.4f}")
        print(f"{name}: step {trainer.step:,}/{max_steps:,}, {figures[-1]}", file=sys.stderr, flush=True)
    speed = max_steps * trainer.config.batch_size * trainer.config.model.seq_len / seconds
    cells = [
        name,
        f"{n_parameters:,}",
        f"{max_steps:,}",
        ", ".join(figures),
        f"{found.val_loss:.4f}",
        f"{speed:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())

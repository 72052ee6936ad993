"""Train a model: `python slm_ray/train.py`, alone or through `ray job submit`.

In: a `TrainConfig` from preset and command line, and a prepared data set. Out: `runs/NAME/` with the checkpoints `best`
and `latest`, an MLflow run, and a summary on the terminal. `distributed.driver.run_training` does the work.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from slm_ray.cli.script import run

    run("slm_ray.train")

import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_ray import storage
from slm_ray.cli.command import command
from slm_ray.cli.script import set_default_environment
from slm_ray.cli.signals import ending_on_sigterm
from slm_ray.config.files import DEFAULT_PRESET, from_dict, load_config
from slm_ray.config.mixtures import parts_of
from slm_ray.config.options import parse, take_option
from slm_ray.config.places import moved_data, moved_place
from slm_ray.config.resuming import KEPT, asks_for_help, asks_to_resume, overlaid, refuse_ignored
from slm_ray.config.schema import TrainConfig
from slm_ray.errors import UserError
from slm_ray.tracking import mlflow_runs

if TYPE_CHECKING:  # with torch and Ray, which `--help` and a wrong option need not wait for
    from slm_ray.distributed.driver import TrainResult
    from slm_ray.runs.run_folder import RunFolder


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, train, say what came out."""
    set_default_environment()
    with ending_on_sigterm():
        config = parse_config(argv)
        from slm_ray.distributed.driver import run_training

        result = run_training(config)
        print(describe(result), flush=True)
        if result.version:
            print(f"model    {_standing(config, result)}")
    return 0


def _standing(config: TrainConfig, result: "TrainResult") -> str:
    """What became of the registered version: the first of its name is promoted."""
    from slm_ray.evaluation.promotion import promote_first

    reference = f"models:/{config.register}/{result.version}"
    if (promotion := promote_first(reference, result.tracking_uri)) is not None:
        return str(promotion)
    data = shlex.split(config.data) if parts_of(config.data) else [config.data]
    command = shlex.join(["slm_ray/evaluate.py", "--model", reference, "--data", *data, "--promote"])
    return f"{reference} is registered; champion if it is better: python {command}"


def describe(result: "TrainResult") -> str:
    """The last lines of a run: where its checkpoints lie, and how good the best is."""
    metrics = result.metrics
    lines = [
        f"best     {result.best}  (step {metrics.step:,})",
        f"latest   {result.latest}",
        f"loss     {metrics.val_loss:.4f} nats per token, {metrics.val_bits_per_byte:.4f} bits per byte, "
        f"perplexity {math.exp(metrics.val_loss):.2f} on the validation split, by {metrics.val_measure}",
    ]
    if storage.is_remote(result.kept_at):
        lines.insert(0, f"kept     {result.kept_at}  (best and latest below are copies of it)")
    if result.run_id:
        lines.append(f"run      {result.run_id}  (to see it: {mlflow_runs.ui_command(result.tracking_uri)})")
    if result.profile:
        lines += ["profile  time of the recorded steps, by part and by operator:", result.profile.rstrip()]
    return "\n".join(lines)


def parse_config(argv: Sequence[str] | None) -> TrainConfig:
    """Preset or file, then the options over it; with --resume, where there is a run, both over the run's own config.

    Raises:
        UserError: no such preset or file, or it cannot be known whether there is a run.
    """
    origin, rest = take_option("config", "", sys.argv[1:] if argv is None else argv)
    about = f"Train a model with Ray Train. --config PRESET|FILE.yaml chooses the defaults ({DEFAULT_PRESET})."
    base = load_config(origin or DEFAULT_PRESET)
    if asks_to_resume(rest, base.resume) and not asks_for_help(rest):
        place = {name: take_option(name, getattr(base, name), rest)[0] for name in ("output", "name")}
        from_dict(TrainConfig, place, "options")  # the others are checked over the run's own config
        base = _config_to_resume(base, origin, _run_to_resume(**place), place["output"], rest)
    elif not asks_for_help(rest):
        from slm_ray.training.starting_point import begun_from

        base = begun_from(base, origin, rest)
    config = parse(TrainConfig, rest, prog="train.py", about=about, default=base)
    refuse_ignored(config, rest)
    return config


def _config_to_resume(
    base: TrainConfig, origin: str, folder: "RunFolder | None", output: str, words: Sequence[str]
) -> TrainConfig:
    """That of the run, with what `--config` gives over it; where there is no run yet, `base`."""
    state = None
    if folder is not None:
        state = folder.mirror.newest_state(folder.path) if folder.mirror.address else folder.latest_state()
    if folder is None or state is None:
        from slm_ray.training.starting_point import begun_from

        return dataclasses.replace(begun_from(base, origin, words), resume=True)
    saved = from_dict(TrainConfig, state.config, str(folder.checkpoint_path(state.step)))
    here = saved.output, folder.path.parent
    teacher = tuple(moved_place(one, *here) for one in saved.teacher)
    was = dataclasses.replace(saved, force=False, data=moved_data(saved.data, *here), teacher=teacher)
    if origin:
        was = overlaid(was, origin, KEPT)
    return dataclasses.replace(was, resume=True, output=output, name=folder.path.name)


def _run_to_resume(output: str, name: str) -> "RunFolder | None":
    """The run of that name, or the newest of a folder on this machine, if there is one."""
    from slm_ray.runs.remote_run import open_run
    from slm_ray.runs.run_folder import newest_run

    if name:
        return open_run(output, name)
    where = storage.storage_path(output)
    if not storage.is_local(where):
        raise UserError(f"--resume needs the --name of a run in {output}")
    return newest_run(where)

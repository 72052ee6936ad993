"""What an ensemble of two gives a student of the default size: `make bench-teachers DATA=data/tinystories`.

Two teachers (the default preset with seeds 1 and 2), the preset alone with seed 0, and the same with `--teacher`: the
two's opinion of every next token beside the stories. All by `slm_ray/train.py` itself, one after another; bits per byte
are those of each run's best checkpoint, by the fair measure on the validation split. The ensemble itself (the mean of
the two's probabilities) is measured too. Options of `train.py`, for all of the runs, stand behind `--`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from product_runs import ROOT, Run, refuse, train
from torch import Tensor, nn

from slm_ray.config.schema import IGNORED_TARGET
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.mapping.mapped import open_split
from slm_ray.tracking.registry import load_model, resolve_model
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import evaluate_stories

sys.path.insert(0, str(ROOT))
from tests.bench.machine import machine_line

STUDENT, TEACHERS = 0, (1, 2)
"""Seeds."""


def main() -> int:
    """Train all of them; print a row for each."""
    parser = argparse.ArgumentParser(prog="bench/teachers.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/tinystories", help="data set (default: data/tinystories)")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5], help="of the teachers (default: 0.5)")
    parser.add_argument("--output", default="", help="where the runs stay (default: nowhere)")
    parser.add_argument("options", nargs="*", help="of train.py, behind --")
    given = parser.parse_args()
    refuse(given.options, "--seed", "--teacher", "--teacher-weight")
    if len(set(given.weights)) < len(given.weights) or not all(0 < weight <= 1 for weight in given.weights):
        sys.stderr.write("error: --weights are above 0, at most 1, and each another one\n")
        return 2
    print(machine_line(), flush=True)
    print("| What | Minutes | tokens/s | Bits per byte | Nats a token |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            _compare(given, Path(given.output or temporary).resolve())
        except subprocess.CalledProcessError as error:  # train.py has said why
            return error.returncode
    return 0


def _compare(given: argparse.Namespace, output: Path) -> None:
    every = ("--data", str(Path(given.data).resolve()), *given.options)
    folders = list[str]()
    for seed in TEACHERS:
        run = train(output / f"seed-{seed}", *every, "--seed", str(seed))
        print(_row(f"teacher, seed {seed}", run), flush=True)
        folders.append(str(run.folder / "best"))
    bits, nats = together(folders, given.data)
    print(f"| the two together | | | {bits:.4f} | {nats:.4f} |", flush=True)
    every = (*every, "--seed", str(STUDENT))
    print(_row(f"alone, seed {STUDENT}", train(output / "alone", *every)), flush=True)
    for weight in given.weights:
        learn = ("--teacher", *folders, "--teacher-weight", str(weight))
        print(_row(f"taught, weight {weight:g}", train(output / f"taught-{weight:g}", *every, *learn)), flush=True)


def _row(what: str, run: Run) -> str:
    best = run.best
    return (
        f"| {what} | {run.seconds / 60:.1f} | {run.tokens_per_s:,.0f} "
        f"| {best['val_bits_per_byte']:.4f} | {best['val_loss']:.4f} |"
    )


class Ensemble(nn.Module):
    """The mean of several models' probabilities, as a model that is measured."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Summed nats of the targets. tokens, targets: (B, T), IGNORED_TARGET where a place does not count."""
        counts = targets.flatten() != IGNORED_TARGET  # (B * T,)
        wanted = targets.flatten()[counts, None]  # (N, 1)
        said = [torch.log_softmax(model(tokens).flatten(0, 1)[counts], -1).gather(-1, wanted) for model in self.models]
        return -(torch.stack(said).logsumexp(0) - torch.tensor(float(len(said))).log()).sum()


def together(folders: Sequence[str], data: str) -> tuple[float, float]:
    """Bits per byte and nats a token of the models together, in fp32."""
    models = [load_model(resolve_model(folder))[0].eval() for folder in folders]
    manifest = load_manifest(data)
    stream, _ = open_split(data, "validation", manifest, manifest.tokenizer["end_token_id"])
    found = evaluate_stories(Ensemble(models), stream, seq_len=models[0].config.seq_len, context=TrainContext())
    return found.val_bits_per_byte, found.val_loss


if __name__ == "__main__":
    sys.exit(main())

"""Serving speed against named peers, in one run: `make bench-serve`.

Tokens per second of greedy stories on this machine's cores, the same weights, prompts and lengths, fresh processes in
turn, ratios round by round: our engine on its backends (`serve_ours.py`), OpenVINO GenAI's continuous batching
(`serve_openvino.py`), llama.cpp (`serve_llamacpp.py`) and `transformers.generate` (`serve_transformers.py`), each in an
environment of its own (`peers.py`; one that does not install is left out with a word), and our server: through Ray
Serve, streaming, with the time to the first token and between what a client receives (`serve_http.py`). Without
`--model` the weights are random: speed does not depend on them.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import FOLDER, MissingPeerError, python_of
from serve_options import PROMPT_TOKENS

from slm_ray.config.files import load_config
from slm_ray.corpus.grammar import sample_stories
from slm_ray.limits import core_count
from slm_ray.model.decoder import Decoder, count_parameters
from slm_ray.runs import checkpoint
from slm_ray.tokenization.training import train_bpe

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from tests.bench.machine import machine_line

BENCH = Path(__file__).resolve().parent
TORCH, ONNX, INT8 = "ours, torch", "ours, onnx", "ours, onnx-int8"
LLAMA, TRANSFORMERS = "llama.cpp", "transformers"
HTTP = "ours, HTTP"
OPENVINO = {f"openvino, {kind}": kind for kind in ("f32", "bf16", "bf16-u8", "int8")}
COMMANDS = {
    TORCH: ["serve_ours.py", "--backend", "torch"],
    ONNX: ["serve_ours.py", "--backend", "onnx"],
    INT8: ["serve_ours.py", "--backend", "onnx-int8"],
    **{side: ["serve_openvino.py", "--backend", kind] for side, kind in OPENVINO.items()},
    LLAMA: ["serve_llamacpp.py"],
    TRANSFORMERS: ["serve_transformers.py"],
}
PEER_OF = {LLAMA: "llama.cpp", TRANSFORMERS: "transformers", **dict.fromkeys(OPENVINO, "openvino")}
"""Which environment a side runs in; ours run in this one."""
CLIENTS_SEE = {
    "of_engine": "share of the engine's speed, in turn",
    "first_p50_ms": "time to the first token, p50, ms",
    "first_p99_ms": "time to the first token, p99, ms",
    "between_p50_ms": "time between parts, p50, ms",
    "between_p99_ms": "time between parts, p99, ms",
    "parts": "parts of a story",
}
GROWTH = "1,2,4,8,16,32,64,128"
Round = dict[str, dict[str, Any]]


def main() -> int:
    """Run all sides in turn, print tables."""
    parser = argparse.ArgumentParser(prog="bench/serve.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a Llama or Qwen3 (default: random weights)")
    parser.add_argument("--preset", default="story-5m", help="shape of the random weights (default: story-5m)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the random weights (default: 4096)")
    parser.add_argument("--streams", default="1,4,16,32", help="stories at a time (default: 1,4,16,32)")
    parser.add_argument(
        "--tokens", default="200", help="to write in each story, as 50,200,500 (default: 200, the mean of TinyStories)"
    )
    parser.add_argument("--prompt-tokens", default=str(PROMPT_TOKENS), help="of each prompt, as 10,100 (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (default: 3)")
    parser.add_argument("--side", action="append", choices=[*COMMANDS, HTTP], help="only these, and repeated")
    parser.add_argument("--ingress", default="auto", help="of the server: direct or proxy (default: what it takes)")
    parser.add_argument("--replicas", type=int, default=1, help="processes of the server (default: 1)")
    parser.add_argument("--growth", action="store_true", help=f"our server alone, with {GROWTH} streams")
    given = parser.parse_args()
    if given.growth:
        given.side, given.streams = [HTTP], GROWTH
    given.threads = core_count()
    print(machine_line(), flush=True)
    pythons = find_pythons(given.side or [*COMMANDS, HTTP])
    lengths, prompts = ([int(one) for one in values.split(",")] for values in (given.tokens, given.prompt_tokens))
    given.longest = max(lengths) + max(prompts)
    with model_folder(given) as folder:
        for tokens, prompt_tokens in itertools.product(lengths, prompts):
            shape = argparse.Namespace(**vars(given) | {"tokens": tokens, "prompt_tokens": prompt_tokens})
            rounds: list[Round] = []
            for number in range(given.rounds):
                rounds.append({})
                for side, python in pythons.items():
                    print(f"round {number + 1} of {given.rounds}: {side}", file=sys.stderr, flush=True)
                    rounds[-1][side] = run(side, python, folder, shape)
            print(f"\nstories of {tokens} tokens after prompts of {prompt_tokens}")
            print_tables(rounds, given)
    return 0


def find_pythons(sides: list[str]) -> dict[str, Path]:
    """The sides that can run here, each with its Python; the others are named."""
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for side in sides:
        peer = PEER_OF.get(side)
        try:
            if peer not in missing:
                found[side] = python_of(peer) if peer else Path(sys.executable)
        except MissingPeerError as error:
            missing[str(peer)] = str(error)
            print(f"without {peer}, which does not install here: {error}", file=sys.stderr, flush=True)
    return found


@contextlib.contextmanager
def model_folder(given: argparse.Namespace) -> Iterator[Path]:
    """The checkpoint that was named, or one of random weights."""
    if given.model:
        yield given.model
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield write_random_model(Path(scratch) / "model", given)


def write_random_model(folder: Path, given: argparse.Namespace) -> Path:
    """Random weights in the preset's shape, with room for prompt and story; the end-of-text token is never the
    likeliest."""
    torch.manual_seed(0)
    tokenizer = train_bpe([*sample_stories(0, 200), made_up_words()], given.vocab_size)
    assert tokenizer.vocab_size == given.vocab_size
    shape = load_config(given.preset).model
    seq_len = max(shape.seq_len, given.longest + 32)
    model = Decoder(dataclasses.replace(shape, vocab_size=given.vocab_size, seq_len=seq_len, tie_embeddings=True))
    model.embed_tokens.weight.data[tokenizer.eos_id] = 0  # its logit is 0, and the largest of all others is above
    state = checkpoint.TrainState(
        step=0, samples_seen=0, seed=0, world_size=1, data_fingerprint="none", config={"name": "bench"}, metrics={}
    )
    checkpoint.save(folder, model, tokenizer, state, {})
    print(f"{given.preset}, random: {count_parameters(model):,} parameters, fp32, {given.threads} threads", flush=True)
    return folder


def made_up_words() -> str:
    """Enough different words for any vocabulary that is measured."""
    dice = random.Random(0)
    return " ".join("".join(dice.choices("abcdefghijklmnopqrst", k=6)) for _ in range(20_000))


def run(side: str, python: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One process of one side."""
    script, *options = COMMANDS.get(side, ["serve_http.py"])
    options += ["--model", str(folder), "--streams", given.streams, "--tokens", str(given.tokens)]
    options += ["--exports", str(FOLDER / "exports"), "--prompt-tokens", str(given.prompt_tokens)]
    options += ["--ingress", given.ingress, "--replicas", str(given.replicas)] if side == HTTP else []
    result: dict[str, Any] = json.loads(
        output(python, script, [*options, "--threads", str(given.threads)]).splitlines()[-1]
    )
    return result


def output(python: Path, script: str, options: list[str]) -> str:
    """What a script prints."""
    words = [str(python), str(BENCH / script), *options]
    environment = dict(os.environ) | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{process.stderr[-3000:]}")
    return process.stdout


def print_tables(rounds: list[Round], given: argparse.Namespace) -> None:
    """Median speeds, ours over each side round by round, and what the server's clients saw, as Markdown tables."""
    streams = given.streams.split(",")
    heads = " | ".join(f"{count} streams" for count in streams)
    rule = "|---" * (len(streams) + 1) + "|"
    print(f"\n| tokens/s | {heads} | stories as {next(iter(rounds[0]))}'s |\n{rule}---|")
    for side in rounds[0]:
        speeds = [statistics.median(one[side]["tokens_per_s"][count] for one in rounds) for count in streams]
        alike = f"{agreement(rounds, side):.0%}" if "stories" in rounds[0][side] else ""
        print(f"| {side} | {' | '.join(f'{speed:,.0f}' for speed in speeds)} | {alike} |")
    print_first(rounds, heads, rule, streams)
    reference = ONNX if ONNX in rounds[0] else next(iter(rounds[0]))
    print(f"\n| {reference} over | {heads} |\n{rule}")
    for side in rounds[0]:
        cells = [ratios(rounds, reference, side, count) for count in streams]
        if side != reference:
            print(f"| {side} | {' | '.join(cells)} |")
    if HTTP in rounds[0]:
        print(f"\n| {HTTP} | {heads} |\n{rule}")
        for name, title in CLIENTS_SEE.items():
            cells = [f"{statistics.median(one[HTTP][name][count] for one in rounds):.3g}" for count in streams]
            print(f"| {title} | {' | '.join(cells)} |")


def print_first(rounds: list[Round], heads: str, rule: str, streams: list[str]) -> None:
    """How long all stories together wait for their first token."""
    print(f"\n| first token of all, ms | {heads} |\n{rule}")
    for side in rounds[0]:
        if "first_ms" in rounds[0][side]:
            values = [statistics.median(one[side]["first_ms"][count] for one in rounds) for count in streams]
            print(f"| {side} | {' | '.join(f'{value:.1f}' for value in values)} |")


def ratios(rounds: list[Round], reference: str, side: str, count: str) -> str:
    """Median of the rounds' ratios, and each."""
    values = [one[reference]["tokens_per_s"][count] / one[side]["tokens_per_s"][count] for one in rounds]
    return f"{statistics.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def agreement(rounds: list[Round], side: str) -> float:
    """Share of the stories that begin with the same ten tokens as those of the first side."""
    first = rounds[0][next(iter(rounds[0]))]["stories"]
    pairs = [pair for count, own in rounds[0][side]["stories"].items() for pair in zip(own, first[count], strict=True)]
    return statistics.mean(mine == theirs for mine, theirs in pairs)


if __name__ == "__main__":
    raise SystemExit(main())

"""Training on one GPU: tokens/s, MFU and memory of ours against nanoGPT's recipe, both compiled in bf16.

    python tests/bench/training/gpu.py --output gpu.json      # measures, and prints the table
    python tests/bench/training/gpu.py --table gpu.json       # prints it again

Each side of each preset runs in a process of its own, in turn, on random tokens: what the arithmetic of a step costs.
Ours is the trainer's own step with all that belongs to it: it makes each batch and takes it to the GPU, where nanoGPT's
batch lies there already. Sequences are added until a step has `--tokens` tokens: 4,096 is story-5m's default batch. The
first steps, which compile, do not count. Nothing waits for the GPU between the steps of a block, as in a training.
`--profile FOLDER` keeps a trace of ours for each preset.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nanogpt_recipe import GPT

from slm_ray.config.files import load_config
from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.stream import TokenStream
from slm_ray.model.decoder import count_parameters
from slm_ray.model.flops import train_flops_per_token
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.metrics import memory
from slm_ray.training.peak_flops import matmul_rates
from slm_ray.training.trainer import Trainer

PRESETS = ("story-5m", "llama2c-15m", "tinystories-28m", "llama2c-42m")
VOCABULARIES = {"story-5m": 4096, "llama2c-15m": 32_000, "tinystories-28m": 50_257, "llama2c-42m": 32_000}
WARMUP_STEPS = 10
N_BLOCKS = 3
N_BATCHES = 16
"""Of random tokens, over and over."""
PROFILED_STEPS = 3
SIDE_TIMEOUT_S = 900
Record = dict[str, Any]


def main() -> int:
    """Measure and print, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only these")
    parser.add_argument("--side", action="append", choices=SIDES, help="only these")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a step (default: 65,536)")
    parser.add_argument("--steps", type=int, default=30, help="that are measured, in three blocks (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides, in turn (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="result file (default: gpu.json)")
    parser.add_argument("--profile", type=Path, help="folder for traces of ours, which chrome://tracing opens")
    parser.add_argument("--table", type=Path, help="print the table of this result file, and measure nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text(encoding="utf-8"))))
        return 0
    if given.measure:
        preset, side = given.measure.split(":")
        print(json.dumps(measure(preset, side, given, torch.device("cuda", 0))))
        return 0
    if not torch.cuda.is_available():
        print("error: torch sees no GPU here", file=sys.stderr)
        return 2
    found: Record = {"machine": machine(), "steps": given.steps, "tokens": given.tokens, "runs": []}
    for number in range(given.rounds):
        for preset in given.preset or PRESETS:
            for side in given.side or SIDES:
                found["runs"].append(run_side(preset, side, given))
                given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                last = found["runs"][-1]
                print(f"round {number + 1}, {preset}, {side}: {last['tokens_per_s']:,.0f} tokens/s", flush=True)
    print(table(found))
    return 0


def machine() -> Record:
    """What it ran on."""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bf16_products_tflops": round(max(matmul_rates(torch.bfloat16, torch.device("cuda", 0), 1)) / 1e12, 1),
    }


def run_side(preset: str, side: str, given: argparse.Namespace) -> Record:
    """One side in a fresh process."""
    command = [sys.executable, __file__, "--measure", f"{preset}:{side}"]
    command += ["--tokens", str(given.tokens), "--steps", str(given.steps)]
    command += ["--profile", str(given.profile)] if given.profile else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=SIDE_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{preset}, {side} failed:\n{done.stderr[-3000:]}")
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


def measure(preset: str, side: str, given: argparse.Namespace, device: torch.device) -> Record:
    """Steps of one side: the median time of a step over the blocks, the most memory, the loss at the end."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = dataclasses.replace(load_config(preset), mtp_weights=())  # the next token alone, as nanoGPT's recipe
    model = dataclasses.replace(config.model, vocab_size=VOCABULARIES[preset])
    rows = max(1, given.tokens // model.seq_len)
    step, n_parameters = SIDES[side](
        dataclasses.replace(config, model=model, batch_size=rows, accumulation_steps=1), device
    )
    for _ in range(WARMUP_STEPS):
        loss = step()
    n_steps, seconds = max(1, given.steps // N_BLOCKS), []
    for _ in range(N_BLOCKS):
        wait(device)
        began = time.perf_counter()
        for _ in range(n_steps):
            loss = step()
        wait(device)
        seconds.append((time.perf_counter() - began) / n_steps)
    if given.profile and side == "ours":
        with profiled(given.profile, preset):
            for _ in range(PROFILED_STEPS):
                step()
    speed = rows * model.seq_len / statistics.median(seconds)
    peak = max(matmul_rates(torch.bfloat16, device, 1))
    return {
        "preset": preset,
        "side": side,
        "parameters": n_parameters,
        "sequences": rows,
        "seq_len": model.seq_len,
        "tokens_per_s": speed,
        "mfu": speed * train_flops_per_token(model) / peak if side != "nanoGPT's recipe" else None,
        "peak_memory_gib": memory(device).get("gpu_peak_memory_bytes", 0.0) / 2**30,
        "loss": float(loss),
    }


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(folder: Path, preset: str) -> contextlib.AbstractContextManager[Any]:
    """Keep a trace of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return torch.profiler.profile(
        activities=activities,
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"{preset}.json.gz")),
    )


Step = Callable[[], torch.Tensor]


def ours(config: TrainConfig, device: torch.device) -> tuple[Step, int]:
    """The trainer's step: our decoder and the preset's optimizer, compiled, in bf16."""
    rows, seq_len = config.batch_size, config.model.seq_len
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=N_BATCHES * rows * seq_len + 1)
    stream = TokenStream(tokens.astype(np.uint16), len(tokens))
    inputs = TrainInputs(
        config=config,
        max_steps=10_000,
        data_fingerprint="",
        folder=RunFolder(Path(tempfile.gettempdir()) / "bench-gpu"),  # of which nothing is made
        train=stream,
        validation=stream,
        tokenizer=None,  # type: ignore[arg-type]  # steps read no text
        tracker=NullTracker(),
    )
    trainer = Trainer(inputs, TrainContext(device=device), "bf16", is_compiled=True)
    trainer.module.train()
    return lambda: trainer.train_step()[0], count_parameters(trainer.model)


def ours_with_adamw(config: TrainConfig, device: torch.device) -> tuple[Step, int]:
    """The same with AdamW."""
    return ours(dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="adamw")), device)


def nanogpt(config: TrainConfig, device: torch.device) -> tuple[Step, int]:
    """nanoGPT's own recipe on a GPU: bf16 autocast, compiled, fused AdamW, the same depth and width."""
    shape = config.model
    batch = torch.randint(0, shape.vocab_size, (config.batch_size, shape.seq_len + 1), device=device)
    plain = GPT(shape.vocab_size, shape.seq_len, shape.n_layers, shape.n_heads, shape.d_model).to(device)
    model = torch.compile(plain)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=device.type == "cuda")
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, sum(parameter.numel() for parameter in plain.parameters())


SIDES = {"ours": ours, "ours, AdamW": ours_with_adamw, "nanoGPT's recipe": nanogpt}


def table(found: Record) -> str:
    """Medians over the rounds, as a Markdown table below a line about the machine."""
    about = found["machine"]
    lines = [
        f"{about['gpu']}, {about['memory_gib']} GiB, torch {about['torch']}, CUDA {about['cuda']}, "
        f"{about['bf16_products_tflops']} TFLOP/s in large bf16 products; {found['tokens']:,} tokens a step",
        "",
        "| preset | side | parameters | sequences | tokens/s | over nanoGPT's | MFU | memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset, side in dict.fromkeys((run["preset"], run["side"]) for run in found["runs"]):
        runs = [run for run in found["runs"] if (run["preset"], run["side"]) == (preset, side)]
        peers = [run for run in found["runs"] if (run["preset"], run["side"]) == (preset, "nanoGPT's recipe")]
        speed = statistics.median(run["tokens_per_s"] for run in runs)
        ratios = [mine["tokens_per_s"] / peer["tokens_per_s"] for mine, peer in zip(runs, peers)]
        over = f"{statistics.median(ratios):.2f}" if ratios else ""
        mfu = f"{statistics.median(run['mfu'] for run in runs):.0%}" if runs[0]["mfu"] else ""
        memory = max(run["peak_memory_gib"] for run in runs)
        shape = f"{runs[0]['parameters']:,} | {runs[0]['sequences']} x {runs[0]['seq_len']}"
        lines.append(f"| {preset} | {side} | {shape} | {speed:,.0f} | {over} | {mfu} | {memory:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

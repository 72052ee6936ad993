"""Training on one GPU: tokens/s, MFU and memory of ours against nanoGPT's recipe, both compiled in bf16.

    python tests/bench/training/gpu.py --output gpu.json      # measures, and prints the table
    python tests/bench/training/gpu.py --table gpu.json       # prints it again

Each side of each preset runs in a process of its own, in turn, on random tokens: what the arithmetic of a step costs.
Sequences are added until a step has `--tokens` tokens. The first steps, which compile, do not count. `--profile FOLDER`
keeps a trace of ours for each preset.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nanogpt_recipe import GPT

from slm_ray.config.files import load_config
from slm_ray.config.schema import OptimConfig
from slm_ray.model.decoder import Decoder, count_parameters
from slm_ray.model.flops import train_flops_per_token
from slm_ray.training.optim import make_optimizer
from slm_ray.training.peak_flops import matmul_rates

PRESETS = ("story-5m", "llama2c-15m", "tinystories-28m", "llama2c-42m")
VOCABULARIES = {"story-5m": 4096, "llama2c-15m": 32_000, "tinystories-28m": 50_257, "llama2c-42m": 32_000}
WARMUP_STEPS = 5
PROFILED_STEPS = 3
SIDE_TIMEOUT_S = 900
Record = dict[str, Any]


def main() -> int:
    """Measure and print, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only these")
    parser.add_argument("--side", action="append", choices=SIDES, help="only these")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a step (default: 65,536)")
    parser.add_argument("--steps", type=int, default=30, help="that are measured (default: 30)")
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
        print(json.dumps(measure(preset, side, given)))
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


def measure(preset: str, side: str, given: argparse.Namespace) -> Record:
    """Steps of one side: their median time, the most memory, the loss at the end."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = load_config(preset).model
    config = dataclasses.replace(config, vocab_size=VOCABULARIES[preset])
    rows = max(1, given.tokens // config.seq_len)
    batch = torch.randint(0, config.vocab_size, (rows, config.seq_len + 1), device=device)
    step, n_parameters = SIDES[side](preset, config, batch, device)
    for _ in range(WARMUP_STEPS):
        loss = step()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(given.steps):
        began = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if given.profile and side == "ours":
        with profiled(given.profile, preset):
            for _ in range(PROFILED_STEPS):
                step()
    speed = rows * config.seq_len / statistics.median(seconds)
    peak = max(matmul_rates(torch.bfloat16, device, 1))
    return {
        "preset": preset,
        "side": side,
        "parameters": n_parameters,
        "sequences": rows,
        "seq_len": config.seq_len,
        "tokens_per_s": speed,
        "mfu": speed * train_flops_per_token(config) / peak if side != "nanoGPT's recipe" else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": float(loss),
    }


def profiled(folder: Path, preset: str) -> contextlib.AbstractContextManager[Any]:
    """Keep a trace of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return torch.profiler.profile(
        activities=activities,
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"{preset}.json.gz")),
    )


Step = Callable[[], torch.Tensor]


def ours(preset: str, config: Any, batch: torch.Tensor, device: torch.device) -> tuple[Step, int]:
    """Our decoder and the preset's optimizer, as the trainer has them."""
    return _ours(load_config(preset).optim, config, batch, device)


def ours_with_adamw(preset: str, config: Any, batch: torch.Tensor, device: torch.device) -> tuple[Step, int]:
    """The same with AdamW."""
    return _ours(dataclasses.replace(load_config(preset).optim, name="adamw"), config, batch, device)


def _ours(optim: OptimConfig, config: Any, batch: torch.Tensor, device: torch.device) -> tuple[Step, int]:
    model = Decoder(config).to(device)
    module = torch.compile(model, dynamic=False)
    optimizer = make_optimizer(model, optim)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = module(inputs, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, count_parameters(model)


def nanogpt(_preset: str, config: Any, batch: torch.Tensor, device: torch.device) -> tuple[Step, int]:
    """nanoGPT's own recipe on a GPU: bf16 autocast, compiled, fused AdamW, the same depth and width."""
    plain = GPT(config.vocab_size, config.seq_len, config.n_layers, config.n_heads, config.d_model).to(device)
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

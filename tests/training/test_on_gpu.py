"""Training on a GPU: every precision, compiled, Muon, resume to the bit, one rank of NCCL, evaluation."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from slm_ray.config.schema import TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.runs import checkpoint
from slm_ray.runs.outcome import RunStatus
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training import hardware
from slm_ray.training.context import TrainContext
from slm_ray.training.evaluation import evaluate_windows
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.peak_flops import matmul_rates
from slm_ray.training.trainer import Trainer
from tests.support.gpu import GPU, needs_gpu

pytestmark = needs_gpu
ON_GPU = TrainContext(device=GPU)
NEAR = {"fp32": 2e-3, "bf16": 0.05, "fp16": 0.05}
"""How far a loss may be from the CPU's in fp32, in nats a token: products of other lengths, and rounding."""


@pytest.fixture
def inputs(tiny_config: TrainConfig) -> TrainInputs:
    vocab_size = load_manifest(tiny_config.data).tokenizer["vocab_size"]
    model = dataclasses.replace(tiny_config.model, vocab_size=vocab_size)
    return load_inputs(dataclasses.replace(tiny_config, model=model), NullTracker())


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that add up in one order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def elsewhere(inputs: TrainInputs, name: str, **changes: Any) -> TrainInputs:
    config = dataclasses.replace(inputs.config, name=name, **changes)
    return dataclasses.replace(inputs, config=config, folder=RunFolder(inputs.folder.path.parent / name))


def losses(inputs: TrainInputs) -> list[float]:
    return inputs.history.series("train_loss")[1]


def with_optimizer(inputs: TrainInputs, name: str, optimizer: str) -> TrainInputs:
    """Muon with further tokens in the loss, as the default preset has both."""
    further = (0.5, 0.25) if optimizer == "muon" else ()
    return elsewhere(inputs, name, optim=dataclasses.replace(inputs.config.optim, name=optimizer), mtp_weights=further)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_curve_is_that_of_the_cpu(inputs: TrainInputs, precision: str, optimizer: str) -> None:
    on_cpu = with_optimizer(inputs, "cpu", optimizer)
    fit(on_cpu, TrainContext())
    here = with_optimizer(inputs, "gpu", optimizer)
    assert fit(here, ON_GPU, precision=precision).status == RunStatus.FINISHED
    assert losses(here) == pytest.approx(losses(on_cpu), abs=NEAR[precision])
    assert losses(here)[-1] < losses(here)[0] < math.log(512) + 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_compiled_run_follows_the_eager_one(inputs: TrainInputs, precision: str) -> None:
    eager, compiled = elsewhere(inputs, "eager"), elsewhere(inputs, "compiled")
    fit(eager, ON_GPU, precision=precision)
    fit(compiled, ON_GPU, precision=precision, is_compiled=True)
    assert losses(compiled) == pytest.approx(losses(eager), abs=NEAR[precision])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_stories_that_see_themselves_alone_are_learned_as_on_the_cpu(
    inputs: TrainInputs, precision: str, is_compiled: bool
) -> None:
    on_cpu = elsewhere(inputs, "cpu", packing="stories", attention="story")
    fit(on_cpu, TrainContext())
    here = elsewhere(on_cpu, "gpu")
    fit(here, ON_GPU, precision=precision, is_compiled=is_compiled)
    assert losses(here) == pytest.approx(losses(on_cpu), abs=NEAR[precision])


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.usefixtures("exact")
def test_a_resumed_run_is_bit_identical(inputs: TrainInputs, optimizer: str, is_compiled: bool) -> None:
    whole = with_optimizer(inputs, "whole", optimizer)
    fit(whole, ON_GPU, precision="bf16", is_compiled=is_compiled)
    parted = with_optimizer(inputs, "parted", optimizer)
    fit(dataclasses.replace(parted, pause_at=4), ON_GPU, precision="bf16", is_compiled=is_compiled)
    assert checkpoint.load_state(parted.folder.latest).step == 4
    fit(parted, ON_GPU, precision="bf16", is_compiled=is_compiled)
    assert losses(parted) == losses(whole)
    for name, weight in checkpoint.load_model(whole.folder.latest)[0].state_dict().items():
        assert torch.equal(weight, checkpoint.load_model(parted.folder.latest)[0].state_dict()[name]), name


def test_a_run_of_the_cpu_goes_on_here_and_back(inputs: TrainInputs) -> None:
    fit(dataclasses.replace(inputs, pause_at=4), TrainContext())
    assert fit(inputs, ON_GPU, precision="bf16").step == 8
    longer = dataclasses.replace(inputs, max_steps=12)
    assert fit(longer, TrainContext()).step == 12


@contextlib.contextmanager
def refuses_to_wait() -> Iterator[None]:
    """torch raises where the host would wait for the GPU; that it calls this a prototype is no failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_never_waits_for_the_gpu(inputs: TrainInputs, optimizer: str, is_compiled: bool) -> None:
    trainer = Trainer(with_optimizer(inputs, "quick", optimizer), ON_GPU, "bf16", is_compiled)
    for _ in range(3):
        trainer.train_step()
    with refuses_to_wait():
        trainer.train_step()


@contextlib.contextmanager
def one_rank_of_nccl(folder: Path) -> Iterator[TrainContext]:
    distributed.init_process_group("nccl", init_method=f"file://{folder / 'meeting'}", rank=0, world_size=1)

    def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(values)
        return values

    try:
        yield TrainContext(
            device=GPU,
            wrap=lambda module: DistributedDataParallel(module, device_ids=[GPU.index]),
            all_reduce_sum=all_reduce_sum,
        )
    finally:
        distributed.destroy_process_group()


def test_one_rank_of_nccl_trains_as_a_process_alone(inputs: TrainInputs, tmp_path: Path) -> None:
    alone, joined = elsewhere(inputs, "alone"), elsewhere(inputs, "joined")
    fit(alone, ON_GPU)
    with one_rank_of_nccl(tmp_path) as context:
        assert fit(joined, context).status == RunStatus.FINISHED
    assert losses(joined) == pytest.approx(losses(alone), abs=NEAR["fp32"])


def test_evaluation_is_that_of_the_cpu(inputs: TrainInputs) -> None:
    fit(inputs, ON_GPU)
    model, _ = checkpoint.load_model(inputs.folder.latest)
    found = {
        device.type: evaluate_windows(
            model.to(device), inputs.validation, seq_len=model.config.seq_len, context=TrainContext(device=device)
        ).val_loss
        for device in (torch.device("cpu"), GPU)
    }
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-4)


def test_what_is_chosen_for_a_gpu(inputs: TrainInputs) -> None:
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    assert hardware.resolve_precision("auto", GPU) == expected
    assert not hardware.resolve_compile(inputs.config, GPU, 10_000, 8)  # off, as the config says
    assert min(matmul_rates(torch.float32, GPU, 1)) > 1e10


def test_memory_of_the_gpu_is_among_the_metrics(inputs: TrainInputs) -> None:
    fit(inputs, ON_GPU)
    assert inputs.history.series("gpu_peak_memory_bytes")[1][-1] > 0

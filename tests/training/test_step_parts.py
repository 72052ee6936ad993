"""Which part of a step an operator's time goes to, by events as torch's profiler gives them."""

import dataclasses
from typing import Any

from slm_ray.training.profiling.parts import Row, rows, table


@dataclasses.dataclass
class Event:
    """What is read of a `FunctionEvent`; times in microseconds."""

    name: str
    own: float = 0.0
    parent: Any = None
    flops: int = 0
    on_gpu: float = 0.0

    @property
    def self_cpu_time_total(self) -> float:
        return self.own

    @property
    def self_device_time_total(self) -> float:
        return self.on_gpu

    @property
    def cpu_parent(self) -> Any:
        return self.parent


def test_each_operator_goes_to_the_innermost_mark_and_to_what_it_is() -> None:
    step = Event("ProfilerStep#11", 100)
    forward, backward, muon = (
        Event("step: forward", parent=step),
        Event("step: backward", 50),
        Event("Optimizer.step#Muon.step"),
    )
    graph = Event("## Call CompiledFxGraph abc", 2_000, forward)
    loss = Event("slm_ray::linear_cross_entropy", 1_000, graph)
    events = [
        step, forward, backward, muon, graph, loss,
        Event("aten::mm", 4_000, graph, flops=800_000_000),
        Event("aten::bmm", 500, graph, flops=1_000_000),
        Event("aten::mm", 3_000, loss, flops=600_000_000),
        Event("aten::_softmax", 600, loss),
        Event("aten::mm", 8_000, backward, flops=1_600_000_000),
        Event("gloo:all_reduce", 900, Event("c10d::allreduce_", 100, backward)),
        Event("aten::baddbmm", 2_000, muon, flops=400_000_000),
        Event("aten::lerp_", 300, muon),
        Event("aten::_fused_adamw_", 70, Event("Optimizer.step#AdamW.step")),
        Event("aten::bmm", 5_000, Event("autograd::engine::evaluate_function: BmmBackward0"), flops=2_000_000),
    ]  # fmt: skip
    assert rows(events, 2) == [
        Row("forward: attention", 0.25, 0.0005),
        Row("forward: linear layers", 2.0, 0.4),
        Row("forward: output layer and loss", 2.3, 0.3),
        Row("forward: the rest", 1.0, 0.0),
        Row("backward: attention", 2.5, 0.001),
        Row("backward: exchange between workers", 0.45, 0.0),
        Row("backward: linear layers", 4.0, 0.8),
        Row("backward: the rest", 0.025, 0.0),
        Row("AdamW", 0.035, 0.0),
        Row("Muon: products", 1.0, 0.2),
        Row("Muon: the rest", 0.15, 0.0),
        Row("other", 0.05, 0.0),
    ]


def test_on_a_gpu_its_own_time_counts() -> None:
    forward = Event("step: forward", 500)
    assert rows([forward, Event("aten::mm", 9, forward, flops=10**9, on_gpu=1_000)], 1, on_gpu=True) == [
        Row("forward: linear layers", 1.0, 1.0)
    ]


def test_the_table_has_rates_shares_of_the_peak_and_the_whole() -> None:
    text = table([Row("forward: linear layers", 30.0, 3.0), Row("other", 10.0, 0.0)], peak=2e11, step_flop=4e9)
    assert [line.split() for line in text.splitlines()] == [line.split() for line in EXPECTED.splitlines()]


EXPECTED = """\
part of a step                            ms   share   GFLOP/s   of peak
forward: linear layers                  30.0   75.0%       100       50%
other                                   10.0   25.0%
the whole step, by the model's FLOPs    40.0  100.0%       100       50%
"""

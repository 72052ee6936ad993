"""Learning from other models: the loss against its definition, who may teach, and a run that resumes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_ray.config.resuming import KEPT, differences
from slm_ray.config.schema import IGNORED_TARGET, ModelConfig, TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError
from slm_ray.model.decoder import Decoder
from slm_ray.runs import checkpoint, verification
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.besides.teachers import Teachers, check_teachers
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs, load_inputs
from slm_ray.training.loop import fit
from slm_ray.training.preflight import refuse_conflicts
from tests.runs.test_checkpoint import STATE
from tests.support.fault_runs import assert_same_run

SHAPE = ModelConfig(vocab_size=40, seq_len=8, n_layers=1, d_model=16, n_heads=2, d_ff=24)


def decoder(seed: int, shape: ModelConfig = SHAPE) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(dataclasses.replace(shape, init_std=0.3)).eval()


@pytest.fixture
def inputs(tiny_config: TrainConfig) -> TrainInputs:
    vocab_size = load_manifest(tiny_config.data).tokenizer["vocab_size"]
    model = dataclasses.replace(tiny_config.model, vocab_size=vocab_size)
    return load_inputs(dataclasses.replace(tiny_config, model=model), NullTracker())


def taught(inputs: TrainInputs, name: str, **changes: Any) -> TrainInputs:
    config = dataclasses.replace(inputs.config, name=name, **changes)
    return dataclasses.replace(inputs, config=config, folder=RunFolder(inputs.folder.path.parent / name))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORED_TARGET
    return tokens[:, :-1], targets


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.7, 2.0), (1.0, 3.0)])
def test_the_loss_mixes_the_targets_with_the_mean_of_the_teachers(weight: float, temperature: float) -> None:
    x, y = batch()
    student, teachers = decoder(0), [decoder(1), decoder(2)]
    found = Teachers(teachers, weight, temperature).loss(student(x), x, y)[0]
    hard = student(x, y)
    thought = sum((model(x) / temperature).softmax(-1) for model in teachers) / 2
    said = (student(x) / temperature).log_softmax(-1)
    divergence = (thought * (thought.log() - said)).sum(-1)[y != IGNORED_TARGET].sum()
    torch.testing.assert_close(found, (1 - weight) * hard + weight * temperature**2 * divergence)


def test_a_student_that_thinks_as_its_teacher_has_nothing_to_learn_of_it() -> None:
    x, y = batch()
    teacher, student = decoder(1), decoder(1)
    loss = Teachers([teacher], 1.0, 2.0).loss(student(x), x, y)[0]
    loss.backward()
    assert abs(loss.item()) < 1e-4
    assert all(parameter.grad.abs().max() < 1e-4 for parameter in student.parameters())


def test_a_run_with_a_teacher_resumes_bit_for_bit_and_learns_what_it_thinks(inputs: TrainInputs) -> None:
    fit(inputs, TrainContext())
    changes = {"teacher": (str(inputs.folder.best),), "teacher_weight": 0.8, "teacher_temperature": 2.0}
    whole = taught(inputs, "whole", **changes)
    fit(whole, TrainContext())
    alone = taught(inputs, "alone")
    fit(alone, TrainContext())
    assert whole.history.series("train_loss")[1] != alone.history.series("train_loss")[1]
    broken = taught(whole, "broken")
    stops = iter([False] * 4 + [True] * 100)
    fit(broken, TrainContext(is_stop_requested=lambda: next(stops)))
    fit(broken, TrainContext())
    assert_same_run(broken.folder, whole.folder)


def saved(folder: Path, shape: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> str:
    checkpoint.save(folder, decoder(seed, shape), tokenizer, STATE, {})
    return str(folder)


def test_a_run_resumes_with_the_weights_that_its_teacher_had_wherever_they_are(
    inputs: TrainInputs, tmp_path: Path
) -> None:
    first, second = (saved(tmp_path / str(n), inputs.config.model, inputs.tokenizer, n) for n in (0, 1))
    link = tmp_path / "best"
    link.symlink_to(first)
    student = taught(inputs, "student", teacher=(str(link),), resume=True)
    stops = iter([False] * 4 + [True] * 100)
    fit(student, TrainContext(is_stop_requested=lambda: next(stops)))
    latest = student.folder.latest_valid()
    assert latest is not None
    digest = verification.file_digest(Path(first), "model/model.safetensors")
    kept = [(one.reference, one.weights_sha256) for one in latest.state.teachers]
    assert kept == [(f"{STATE.config['name']}/step-{STATE.step:08d}" if "name" in STATE.config else "best", digest)]
    link.unlink()
    link.symlink_to(second)
    for config in (student.config, dataclasses.replace(student.config, teacher=(second,))):
        with pytest.raises(UserError, match=f"other weights than those that were learned from .sha256 {digest[:12]}"):
            check_teachers(config, [digest])
        with pytest.raises(UserError, match="other weights than those that were learned from"):
            fit(dataclasses.replace(student, config=config), TrainContext())
    elsewhere = dataclasses.replace(student.config, teacher=(first,))
    refuse_conflicts(dataclasses.replace(student, config=elsewhere), latest)
    check_teachers(elsewhere, [digest])
    with pytest.raises(UserError, match="teacher was"):
        both = dataclasses.replace(elsewhere, teacher=(first, second))
        refuse_conflicts(dataclasses.replace(student, config=both), latest)
    fit(dataclasses.replace(student, config=elsewhere), TrainContext())


def test_a_teacher_of_the_same_tokenizer_may_teach(inputs: TrainInputs, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", inputs.config.model, inputs.tokenizer)
    check_teachers(dataclasses.replace(inputs.config, teacher=(model,)))


def test_a_teacher_of_another_tokenizer_is_refused(inputs: TrainInputs, tmp_path: Path) -> None:
    texts = ["Another text altogether, with other words."] * 3
    other = train(texts, 300)
    shape = dataclasses.replace(inputs.config.model, vocab_size=other.vocab_size)
    model = saved(tmp_path / "model", shape, other)
    with pytest.raises(UserError, match="another tokenizer"):
        check_teachers(dataclasses.replace(inputs.config, teacher=(model,)))


def test_a_teacher_that_sees_less_is_refused(inputs: TrainInputs, tmp_path: Path) -> None:
    shape = dataclasses.replace(inputs.config.model, seq_len=4)
    model = saved(tmp_path / "model", shape, inputs.tokenizer)
    with pytest.raises(UserError, match="a context of 4 tokens"):
        check_teachers(dataclasses.replace(inputs.config, teacher=(model,)))


def test_there_is_no_such_teacher(inputs: TrainInputs) -> None:
    with pytest.raises(UserError, match="nowhere"):
        check_teachers(dataclasses.replace(inputs.config, teacher=("nowhere",)))


def test_a_resumed_run_keeps_its_teachers() -> None:
    was, now = (dataclasses.asdict(TrainConfig(teacher=teacher)) for teacher in (("a",), ("b",)))
    assert set(differences(was, now, KEPT)) == {"teacher"}


@pytest.mark.parametrize(("field", "value"), [("teacher_weight", 1.5), ("teacher_temperature", 0.0)])
def test_values_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})

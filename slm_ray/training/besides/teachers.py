"""Models that a run learns from beside the stories: `--teacher`.

In: references to models of the data set's tokenizer. Out: for the driver a refusal before anything starts; for a worker
`Teachers`, whose `loss` mixes the stories' next tokens with what the teachers think of them (Hinton et al., "Distilling
the Knowledge in a Neural Network", arXiv:1503.02531, section 2). A teacher draws nothing by chance, and a run
keeps which weights it had: it resumes as exactly as without one, or not at all.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slm_ray.config.schema import IGNORED_TARGET, ModelConfig, TrainConfig
from slm_ray.dataset.manifest import load_manifest
from slm_ray.errors import UserError, without_secrets
from slm_ray.model.decoder import Decoder
from slm_ray.model.further_targets import further_targets
from slm_ray.runs.train_state import Origin
from slm_ray.tokenization.extension import new_entries
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tracking.registry import load_model, model_shape, resolved_model, weights_digest
from slm_ray.training.besides.origins import origin_of
from slm_ray.training.inputs import load_tokenizer


def check_teachers(config: TrainConfig, *pinned: Sequence[str]) -> None:
    """Refuse teachers that cannot teach this run, before anything starts.

    `pinned`: each the sha256 of the weights that they must have, in their order; any, when empty.

    Raises:
        UserError: there is no such model; it has another tokenizer, or a shorter context of positions that it learned;
            or other weights.
    """
    if config.teacher:
        tokenizer = load_tokenizer(config, load_manifest(config.data))
        found = [_load(one, config, tokenizer)[1] for one in config.teacher]
        for wanted in pinned:
            refuse_others(found, wanted, config.teacher)


def check_shapes(config: TrainConfig) -> None:
    """Refuse teachers of too small a shape, by their headers alone. Raises: UserError, as `check_teachers`."""
    for reference in config.teacher:
        with resolved_model(reference, config.tracking_uri) as found:
            _check_shape(reference, model_shape(found), config)


def pinned_teachers(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """References to the very weights that the teachers have now, and their sha256, as `pinned_origin`.

    Raises:
        UserError: there is no such model.
    """
    places, digests = list[str](), list[str]()
    for reference in config.teacher:
        with resolved_model(reference, config.tracking_uri) as found:
            places.append(found.pinned or str(found.path))
            digests.append(weights_digest(found))
    return tuple(places), tuple(digests)


def refuse_others(found: Sequence[Origin], pinned: Sequence[str], references: Sequence[str]) -> None:
    """Raises: UserError where weights are not those of the sha256 that was recorded, if one was."""
    for one, wanted, reference in zip(found, pinned, references, strict=False):
        if one.weights_sha256 != wanted:
            raise UserError(
                f"teacher {without_secrets(reference)} has other weights than those that were learned from "
                f"(sha256 {wanted[:12]}): name these, or take another --name"
            )


def load_teachers(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> "Teachers | None":
    """The teachers of a resolved config on a device; None without any. Raises: UserError as `check_teachers`."""
    if not config.teacher:
        return None
    models, origins = zip(*(_load(reference, config, tokenizer) for reference in config.teacher), strict=True)
    on_device = [model.to(device) for model in models]
    return Teachers(on_device, config.teacher_weight, config.teacher_temperature, origins)


def _load(reference: str, config: TrainConfig, tokenizer: Tokenizer) -> tuple[Decoder, Origin]:
    with resolved_model(reference, config.tracking_uri) as found:
        model, its_tokenizer = load_model(found)
        origin = origin_of(reference, found)
    try:
        added = len(new_entries(its_tokenizer, tokenizer))
    except ValueError as error:
        raise UserError(f"teacher {reference} has another tokenizer than {config.data}: {error}") from error
    if added:
        raise UserError(f"teacher {reference} has another tokenizer than {config.data}, which has {added} more entries")
    _check_shape(reference, model.config, config)
    return model.eval().requires_grad_(False), origin


def _check_shape(reference: str, shape: ModelConfig, config: TrainConfig) -> None:
    if shape.vocab_size < config.model.vocab_size:
        raise UserError(f"teacher {reference} has {shape.vocab_size} entries, and the model {config.model.vocab_size}")
    longest, wanted = shape.seq_len, config.model.seq_len
    if longest < wanted:
        raise UserError(f"teacher {reference} has a context of {longest} tokens, and the model one of {wanted}")


@dataclasses.dataclass(frozen=True, eq=False)
class Teachers:
    """Models in eval mode, without gradients, on the device of the student."""

    models: Sequence[Decoder]
    weight: float
    """Of what they think in the loss; the stories have the rest."""
    temperature: float
    origins: Sequence[Origin] = ()
    """Which weights these are, in their order."""

    def loss(
        self,
        logits: Tensor,
        tokens: Tensor,
        targets: Tensor,
        places: Tensor | None = None,
        further: Tensor | None = None,
    ) -> Tensor:
        """The summed loss of a student, in nats, (2,): with the stories' further tokens and without.

        (1 - weight) times the loss of the targets, and weight x temperature^2 times the divergence of the student from
        the mean of the teachers' distributions, both at that temperature.

        logits: (B, T, vocab_size) of the student. tokens, targets: (B, T), IGNORED_TARGET where a place does not count.
        places, further: as `Decoder.forward` takes them. All logits are held at once, in fp32.
        """
        counts = targets.flatten() != IGNORED_TARGET  # (B * T,)
        own = logits.flatten(0, 1)[counts].float()  # (N, vocab_size)
        hard = F.cross_entropy(own, targets.flatten()[counts], reduction="sum")
        with torch.no_grad():
            thoughts = torch.zeros_like(own)
            for model in self.models:
                theirs = (
                    model(tokens, None, places)[..., : own.shape[-1]].flatten(0, 1)[counts].float()
                )  # (N, vocab_size)
                thoughts += torch.softmax(theirs / self.temperature, dim=-1)
            thoughts /= len(self.models)
        said = torch.log_softmax(own / self.temperature, dim=-1)
        soft = F.kl_div(said, thoughts, reduction="sum")
        loss = (1 - self.weight) * hard + self.weight * self.temperature**2 * soft
        if further is None:
            return loss.expand(2)
        beyond = further_targets(targets, len(further), places).flatten(0, 1)[counts, 1:]  # (N, K)
        nats = -torch.log_softmax(own, dim=-1).gather(1, beyond.clamp_min(0))  # (N, K)
        nats = nats.where((beyond != IGNORED_TARGET) & (further > 0), 0)
        return torch.stack((loss + (1 - self.weight) * (nats * further).sum(), loss.detach()))

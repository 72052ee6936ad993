"""Which weights a run begins with or learns from, by names that mean something elsewhere too.

In: a reference and the model that it led to. Out: an `Origin`, which a run's state keeps.
"""

from slm_ray.config.places import origin_name
from slm_ray.runs import checkpoint
from slm_ray.runs.run_folder import CHECKPOINT_NAME
from slm_ray.runs.train_state import Origin, TrainState
from slm_ray.tracking.registry import ResolvedModel, weights_digest


def origin_of(reference: str, found: ResolvedModel) -> Origin:
    """Which weights, and what they began and learned from themselves, without any place of this machine.

    Raises:
        UserError: they, or the state of their run, cannot be read.
    """
    digest = weights_digest(found)
    if found.is_foreign:
        return Origin(reference=origin_name(found.pinned or reference), weights_sha256=digest)
    state = checkpoint.load_state(found.path)
    whole = Origin(
        reference=found.pinned or _checkpoint_name(reference, state),
        weights_sha256=digest,
        step=state.step,
        run_id=found.run_id or state.run_id,
        lineage=state.data_lineage,
        mixtures=state.mixtures,
        origin=state.origin,
        is_start_known=state.are_teachers_known,
        teachers=state.teachers,
    )
    return whole.shortened()


def _checkpoint_name(place: str, state: TrainState) -> str:
    """A checkpoint as others may see it: its folder's last name, after that of its run where every run has such a one.

    `runs/a/best` -> `a/step-00000400`.
    """
    name, run = origin_name(place), str(state.config.get("name") or "")
    if run and (name in ("best", "latest") or CHECKPOINT_NAME.fullmatch(name)):
        return f"{run}/step-{state.step:08d}"
    return name

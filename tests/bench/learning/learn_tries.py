"""What the bench of learning tries: each a change of the base, one factor at a time, and how the winners are combined.

In: nothing. Out: `TRIES` by name; configs and further options of a try (`learn_try.py`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learn_demos import DEMOS
from learn_try import BASE, Try, parts

from slm_ray.config.files import from_dict
from slm_ray.config.schema import TrainConfig

MAX_PARAMETERS = 5.3e6
WON = 0.0010
"""Bits per byte below the base from which a factor is combined with others; one recipe's seeds differ by about this."""


OLD = {  # the preset as it was when these tries were made, whatever the preset becomes
    "batch_size": 16,
    "model": {"seq_len": 128, "n_layers": 5, "d_model": 256, "n_heads": 8, "d_ff": 704},
    "optim": {"name": "muon", "lr": 3e-3, "min_lr": 0.0, "schedule": "linear", "embed_lr_factor": 2.0}
    | {"normalize_rows": True},
}


def _model(axis: str = "shape", **changes: Any) -> Try:
    return Try({"model": changes}, axis=axis)


def _optim(axis: str, **changes: Any) -> Try:
    return Try({"optim": changes}, axis=axis)


def _extra(axis: str, **extras: Any) -> Try:
    return Try(extras=extras, axis=axis)


def _further(weights: Sequence[float], until: float, data: str = "", **changes: Any) -> Try:
    """Multi-token prediction."""
    return Try({"mtp_weights": list(weights), "mtp_until": until} | changes, axis="further tokens", data=data)


FURTHER: dict[str, Try] = {
    "mtp 0.5, 0.25": _further((0.5, 0.25), 0.6667),
    "mtp 0.3, 0.15": _further((0.3, 0.15), 0.6667),
    "mtp 1, 0.5 until 0.8": _further((1.0, 0.5), 0.8),
    "mtp 0.5 until 0.5": _further((0.5,), 0.5),
    "mtp 0.5 until 0.3": _further((0.5,), 0.3),
    "mtp 0.5, 0.25, batch 8, lr 2e-3": _further((0.5, 0.25), 0.6667, batch_size=8, optim={"lr": 2e-3}),
    "mtp 0.5, 0.25, vocabulary 2,048, six layers": _further(
        (0.5, 0.25), 0.6667, "-2048", model={"n_layers": 6, "d_ff": 672}
    ),
    "mtp 0.5 until 0.5, vocabulary 8,192": _further((0.5,), 0.5, model={"n_layers": 4, "d_ff": 640}, data="-8192"),
    "mtp 0.5 until 0.5, vocabulary 8,192, five layers": _further(
        (0.5,), 0.5, "-8192", model={"n_layers": 5, "d_ff": 448}
    ),
    "mtp 0.5 until 0.5, vocabulary 12,288, three layers": _further(
        (0.5,), 0.5, "-12288", model={"n_layers": 3, "d_ff": 512}
    ),
}


def _with_further(batch_size: int = 16, extras: Mapping[str, Any] | None = None, **changes: Any) -> Try:
    """A change of the base with two further tokens: `optim_lr` is a field of the optimizer, others are the model's."""
    return Try({"batch_size": batch_size, **parts(changes)}, extras or {}, parent="mtp 0.5, 0.25")


BEST: dict[str, Any] = {"qk_norm": True, "optim_momentum": 0.9}
WITH_FURTHER: dict[str, Try] = {
    "mtp, qk-norm": _with_further(qk_norm=True),
    "mtp, momentum 0.97": _with_further(optim_momentum=0.97),
    "mtp, batch 32, lr 4e-3": _with_further(32, optim_lr=4e-3),
    "mtp, 7 x 224": _with_further(n_layers=7, d_model=224, n_heads=7, d_ff=608),
    "mtp, 10 x 192": _with_further(n_layers=10, d_model=192, n_heads=6, d_ff=512),
    "mtp, four heads": _with_further(n_heads=4),
    "mtp, qk-norm, 7 x 224": _with_further(qk_norm=True, n_layers=7, d_model=224, n_heads=7, d_ff=608),
    "mtp, qk-norm, lr 4e-3": _with_further(qk_norm=True, optim_lr=4e-3),
    "mtp, qk-norm, context 256, batch 8": _with_further(8, qk_norm=True, seq_len=256),
    "mtp, qk-norm, momentum 0.9": _with_further(**BEST),
    "mtp, qk-norm, momentum 0.85": _with_further(qk_norm=True, optim_momentum=0.85),
    "mtp, qk-norm, momentum 0.9, lr 2.3e-3": _with_further(**BEST, optim_lr=2.3e-3),
    "mtp, qk-norm, momentum 0.9, embeddings 4": _with_further(**BEST, optim_embed_lr_factor=4.0),
    "mtp, qk-norm, batch 32, lr 5e-3, momentum 0.85": _with_further(
        32, **BEST | {"optim_lr": 5e-3, "optim_momentum": 0.85}
    ),
    "mtp, qk-norm, batch 32, lr 7e-3, momentum 0.85": _with_further(
        32, **BEST | {"optim_lr": 7e-3, "optim_momentum": 0.85}
    ),
    "mtp, qk-norm, context 256, batch 16, lr 5e-3, momentum 0.85": _with_further(
        16, seq_len=256, **BEST | {"optim_lr": 5e-3, "optim_momentum": 0.85}
    ),
    "mtp, qk-norm, four heads, context 256, batch 16, lr 7e-3, momentum 0.85": _with_further(
        16, seq_len=256, n_heads=4, **BEST | {"optim_lr": 7e-3, "optim_momentum": 0.85}
    ),  # as the preset has it
    "mtp, qk-norm, momentum 0.9, soap": _with_further(extras={"soap": 20}, **BEST),
    "mtp, qk-norm, momentum 0.9, lookahead 0.6": _with_further(**BEST, optim_lookahead=0.6),
}
STEPS: dict[str, Try] = {
    BASE: Try(OLD, parent=""),
    "batch 8": Try({"batch_size": 8}, axis="batch"),
    "batch 8, lr 2e-3": Try({"batch_size": 8, "optim": {"lr": 2e-3}}, axis="batch"),
    "stories": Try({"packing": "stories"}, axis="context"),
    "stories apart": Try({"packing": "stories", "attention": "story"}, axis="context"),
    "stories in 256": Try({"packing": "stories", "batch_size": 8, "model": {"seq_len": 256}}, axis="context"),
    "stories apart in 256": Try(
        {"packing": "stories", "attention": "story", "batch_size": 8, "model": {"seq_len": 256}}, axis="context"
    ),
    "stories apart in 512": Try(
        {"packing": "stories", "attention": "story", "batch_size": 4, "model": {"seq_len": 512}}, axis="context"
    ),
    "context from 64": _extra("context", grow=((0.4, 64),)),
    "context from 32": _extra("context", grow=((0.2, 32), (0.5, 64))),
    "lr 2e-3": _optim("lr", lr=2e-3),
    "lr 4.5e-3": _optim("lr", lr=4.5e-3),
    "lookahead 0.6": _optim("lookahead", lookahead=0.6),
    "lookahead 0.3": _optim("lookahead", lookahead=0.3),
    "tail average 0.6": _optim("tail", tail_average=0.6),
    "tail average 1": _optim("tail", tail_average=1.0),
    "cautious decay": _extra("decay", cautious=True),
    "cautious decay 0.3": Try({"optim": {"weight_decay": 0.3}}, {"cautious": True}, axis="decay"),
    "decay 0.3": _optim("decay", weight_decay=0.3),
    "decay 0.03": _optim("decay", weight_decay=0.03),
    "row floor 4": _extra("floor", row_floor=4.0),
    "row floor 8": _extra("floor", row_floor=8.0),
}
SHAPES: dict[str, Try] = {
    "qk-norm": _model("qk", qk_norm=True),
    "vocabulary 2,048": Try({"model": {"d_ff": 832}}, axis="shape", data="-2048"),
    "vocabulary 2,048, six layers": Try({"model": {"n_layers": 6, "d_ff": 672}}, axis="shape", data="-2048"),
    "vocabulary 1,024, six layers": Try({"model": {"n_layers": 6, "d_ff": 720}}, axis="shape", data="-1024"),
    "vocabulary 2,048, 8 x 224": Try(
        {"model": {"n_layers": 8, "d_model": 224, "n_heads": 7, "d_ff": 576}}, axis="shape", data="-2048"
    ),
    "vocabulary 8,192": Try({"model": {"n_layers": 4, "d_ff": 640}}, axis="shape", data="-8192"),
    "7 x 224": _model(n_layers=7, d_model=224, n_heads=7, d_ff=608),
    "10 x 192": _model(n_layers=10, d_model=192, n_heads=6, d_ff=512),
    "3 x 320": _model(n_layers=3, d_model=320, n_heads=10, d_ff=896),
    "6 x 256": _model(n_layers=6, d_ff=576),
    "d_ff 760": _model(d_ff=760),
    "two key-value heads": _model("shape", n_kv_heads=2, d_ff=832),
    "four heads": _model("heads", n_heads=4),
    "sixteen heads": _model("heads", n_heads=16),
    "rotary base 1,000": _model("theta", rope_theta=1000.0),
    "init 0.04": _model("init", init_std=0.04),
    "init 0.01": _model("init", init_std=0.01),
    "zero outputs": _extra("init", zero_outputs=True),
    "dropout 0.05": _model("dropout", dropout=0.05),
}
RATES: dict[str, Try] = {
    "embeddings 1": _optim("embeddings", embed_lr_factor=1.0),
    "embeddings 4": _optim("embeddings", embed_lr_factor=4.0),
    "beta2 0.99": _optim("beta2", beta2=0.99),
    "beta1 0.8": _optim("beta1", beta1=0.8),
    "momentum 0.9": _optim("momentum", momentum=0.9),
    "momentum 0.97": _optim("momentum", momentum=0.97),
    "momentum from 0.85": _extra("momentum", momentum_from=0.85),
    "warmup 0": _optim("warmup", warmup_steps=0),
    "warmup 150": _optim("warmup", warmup_steps=150),
    "constant, then 0.6": _optim("schedule", schedule="constant", decay_share=0.6),
    "cosine to 0": _optim("schedule", schedule="cosine"),
    "power 1.3": _extra("schedule", power=1.3),
    "AdamW's part to a fifth": _extra("cooldown", adamw_floor=0.2),
    "clipping off": _optim("clip", clip_norm=0.0),
    "z-loss": _extra("loss", z_loss=1e-4),
    "batch 4, lr 2e-3": Try({"batch_size": 4, "optim": {"lr": 2e-3}}, axis="batch"),
    "context 256, batch 8": Try({"batch_size": 8, "model": {"seq_len": 256}}, axis="context"),
    "context from 32 to 256": Try(
        {"batch_size": 8, "model": {"seq_len": 256}}, {"grow": ((0.15, 32), (0.3, 64), (0.6, 128))}, axis="context"
    ),
    "stories in 512": Try({"packing": "stories", "batch_size": 4, "model": {"seq_len": 512}}, axis="context"),
    "context 256, batch 4": Try({"batch_size": 4, "model": {"seq_len": 256}}, axis="context"),
    "soap": _extra("", soap=20),
    # what is stated besides
    "0.7 of an epoch": Try(share=0.7),
    "adamw": _optim("", name="adamw"),
}


TRIES = STEPS | FURTHER | WITH_FURTHER | SHAPES | DEMOS | RATES


def chain(name: str, tries: Mapping[str, Try] = TRIES) -> list[Try]:
    """A try behind those that it changes."""
    found = [tries[name]]
    while found[0].parent:
        found.insert(0, tries[found[0].parent])
    return found


def resolved(name: str, tries: Mapping[str, Try] = TRIES) -> Try:
    """A try with all that it inherits; its changes are a whole config's."""
    changes: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    data, share = "", 1.0
    for one in chain(name, tries):
        changes, extras = merged(changes, one.changes), extras | dict(one.extras)
        data, share = one.data or data, share * one.share
    return Try(changes, extras, "", tries[name].axis, data, share)


def config_of(one: Try, name: str, *, data: str, seed: int, share: float = 1.0) -> TrainConfig:
    """The config of a resolved try."""
    folder = data + one.data if one.data.startswith("-") or not one.data else str(Path(data).parent / one.data)
    own = {"data": folder, "seed": seed, "epochs": one.share * share, "tracking_uri": "none", "name": "try"}
    return from_dict(TrainConfig, dict(one.changes) | own, name)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with changes over them."""
    new = dict(values)
    for key, value in changes.items():
        new[key] = merged(new.get(key, {}), value) if isinstance(value, Mapping) else value
    return new


def together(names: Sequence[str], tries: Mapping[str, Try] = TRIES) -> Try:
    """Several tries at once, changes of `BASE` each."""
    changes: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    data = ""
    for name in names:
        for one in chain(name, tries)[1:]:
            changes, extras, data = merged(changes, one.changes), extras | dict(one.extras), one.data or data
    return Try(changes, extras, BASE, "", data)


def winners(figures: Mapping[str, float], tries: Mapping[str, Try] = TRIES) -> list[str]:
    """The best try of each axis that beats the base by `WON`, the most useful first. figures: bits per byte by name."""
    best: dict[str, str] = {}
    for name in sorted(figures, key=figures.__getitem__):
        axis = tries[name].axis
        if axis and figures[BASE] - figures[name] > WON:
            best.setdefault(axis, name)
    return list(best.values())

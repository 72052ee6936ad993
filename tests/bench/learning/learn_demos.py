"""The tries of the demo's preset, by name: its corpus is the sample's, in vocabularies of their own."""

from typing import Any

from learn_try import Try, parts

DEMO = {
    "batch_size": 16,
    "model": {"seq_len": 256, "n_layers": 4, "d_model": 128, "n_heads": 4, "d_ff": 256},
    "optim": {"lr": 4e-3},
}
MUON = {"name": "muon", "lr": 1e-2, "min_lr": 0.0, "schedule": "linear", "normalize_rows": True}


def _demo(batch_size: int = 4, data: str = "demo-1024", share: float = 1.0, **changes: Any) -> Try:
    """A change of the demo with Muon: `optim_lr` is a field of the optimizer, others are the model's."""
    found = parts(changes)
    found["optim"] = MUON | found["optim"]
    return Try({"batch_size": batch_size, **found}, parent="demo", data=data, share=share)


DEMOS: dict[str, Try] = {
    "demo": Try(DEMO, {"stories": 48}, parent="", data="demo-2048"),
    "demo, muon": _demo(16, "demo-2048"),
    "demo, muon, batch 8": _demo(8, "demo-2048"),
    "demo, muon, batch 4": _demo(4, "demo-2048"),
    "demo, muon, 1,024": _demo(4),
    "demo, muon, 512": _demo(4, "demo-512"),
    "demo, 1,024, lr 5e-3": _demo(4, optim_lr=5e-3),
    "demo, 1,024, lr 2e-2": _demo(4, optim_lr=2e-2),
    "demo, 1,024, embeddings 2": _demo(4, optim_embed_lr_factor=2.0),
    "demo, 1,024, embeddings 0.5": _demo(4, optim_embed_lr_factor=0.5),
    "demo, 1,024, batch 2": _demo(2, optim_lr=7e-3),
    "demo, 1,024, qk-norm": _demo(4, qk_norm=True),
    "demo, 1,024, two layers": _demo(4, n_layers=2),
    "demo, 1,024, three layers": _demo(4, n_layers=3),
    "demo, 1,024, six layers": _demo(4, n_layers=6),
    "demo, 1,024, eight heads": _demo(4, n_heads=8),
    "demo, 1,024, two heads": _demo(4, n_heads=2),
    "demo, 1,024, d_model 96": _demo(4, d_model=96, n_heads=3, d_ff=256),
    "demo, 1,024, d_model 192": _demo(4, d_model=192, n_heads=6, d_ff=384),
    "demo, 1,024, d_ff 512": _demo(4, d_ff=512),
    "demo, 1,024, 0.7 of an epoch": _demo(4, share=0.7),
    "demo, 1,024, two epochs": _demo(4, share=2.0),
    "demo, brief stories, 2,048": _demo(4, "brief-2048"),
    "demo, brief stories, 1,024": _demo(4, "brief-1024"),
    "demo, lr 6e-3, embeddings 3": _demo(4, "demo-2048", share=0.75, optim_lr=6e-3, optim_embed_lr_factor=3.0),
    "demo, brief, lr 6e-3, embeddings 3": _demo(4, "brief-2048", share=0.75, optim_lr=6e-3, optim_embed_lr_factor=3.0),
    "demo, stories apart in 320, lr 6e-3, embeddings 3": Try(
        {"packing": "stories", "attention": "story", "model": {"seq_len": 320}}, parent="demo, lr 6e-3, embeddings 3"
    ),
    "demo, brief stories apart, lr 6e-3, embeddings 3": Try(
        {"packing": "stories", "attention": "story"}, parent="demo, brief, lr 6e-3, embeddings 3"
    ),
    "demo, brief stories apart, lr 2e-2, qk-norm": Try(
        {"model": {"qk_norm": True}, "optim": {"lr": 2e-2, "embed_lr_factor": 1.0}},
        parent="demo, brief stories apart, lr 6e-3, embeddings 3",
    ),
    "demo, stories": Try({"packing": "stories"}, parent="demo, muon, batch 4"),
    "demo, stories apart": Try({"packing": "stories", "attention": "story"}, parent="demo, muon, batch 4"),
    "demo, brief stories apart": Try({"packing": "stories", "attention": "story"}, parent="demo, brief stories, 2,048"),
    "demo, context 128, batch 8": _demo(8, seq_len=128),
}

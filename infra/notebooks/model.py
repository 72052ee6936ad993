# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""
# A model in a notebook

A small language model from texts to stories in one process: a tokenizer is learned, a decoder is trained with the
trainer that Ray Train runs on a cluster, and it writes with the engine of the server. No cluster, no registry, no
files.

It runs in Jupyter in a checkout, and on Google Colab: there, set `repository` to the address that you clone from.
"""

# %% tags=["parameters"]
repository = ""  # on Colab: the address behind `git clone`
own_text = ""  # a text file with a blank line between stories; empty: stories of the embedded sample corpus
n_stories = 3000
vocab_size = 1024
steps = 300

# %% [markdown]
"""
## Install

In a checkout with `make setup` there is nothing to do. Elsewhere the code is fetched and installed with what this
notebook needs; torch is what the machine has.
"""

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("slm_ray") is None:
    if not repository:
        raise SystemExit("slm_ray is not installed: set `repository` above to the address that you clone from")
    subprocess.run(["git", "clone", "--depth", "1", repository, "slm-ray"], check=True)
    needed = ["./slm-ray", "matplotlib", "pydantic>=2.7", "pyyaml", "safetensors", "torch>=2.9"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *needed], check=True)
    importlib.invalidate_caches()

# %% [markdown]
"""
## Texts
"""

# %%
from pathlib import Path

from slm_ray.corpus.grammar import sample_stories

if own_text:
    parts = Path(own_text).read_text(encoding="utf-8").split("\n\n")
    texts = [" ".join(part.split()) for part in parts if part.strip()]
else:
    texts = list(sample_stories(0, n_stories))
held_out = max(1, len(texts) // 20)
train_texts, validation_texts = texts[held_out:], texts[:held_out]
print(f"{len(train_texts):,} stories to learn from, {len(validation_texts):,} held out")
print(texts[0])

# %% [markdown]
"""
## A tokenizer

Byte-level BPE: it begins with the 256 bytes and joins what stands together most often. More entries make shorter texts
and a larger embedding. Try other sizes: what counts in the end is bits per byte, which can be compared between them.
"""

# %%
from slm_ray.tokenization.training import train_bpe

for size in sorted({300, 512, vocab_size}):
    tokenizer = train_bpe(train_texts[:1000], vocab_size=size)
    ids = tokenizer.encode(validation_texts[0])
    print(f"{size:>5} entries: {len(validation_texts[0].encode()) / len(ids):.2f} bytes a token")
print("|".join(tokenizer.decode([token]) for token in ids[:40]))

# %% [markdown]
"""
## A stream of tokens

Stories one after another, each with the end-of-text token behind it. A sample is a window of the stream; which windows
a step sees is a function of the seed and the step's number alone.
"""

# %%
import numpy as np

from slm_ray.dataset.stream import TokenStream


def stream(stories: list[str]) -> TokenStream:
    """All stories in one array of tokens, and where each of them ends."""
    encoded = [[*tokenizer.encode(story), tokenizer.eos_id] for story in stories]
    ends = np.cumsum([0, *map(len, encoded)])
    n_bytes = sum(len(story.encode()) for story in stories)
    return TokenStream.of_split(np.concatenate(encoded).astype(np.uint16), n_bytes, tokenizer.eos_id, ends)


train, validation = stream(train_texts), stream(validation_texts)
print(f"{len(train.tokens):,} tokens to learn from")

# %% [markdown]
"""
## A model

The shape of Llama: normalised before each block, rotary positions, a gated feed-forward block, the output layer tied to
the embedding. Every field is an option of `train.py --model.NAME`.
"""

# %%
import tempfile

from slm_ray.config.schema import ModelConfig, OptimConfig, TrainConfig
from slm_ray.runs.run_folder import RunFolder
from slm_ray.tracking.tracker import NullTracker
from slm_ray.training.context import TrainContext
from slm_ray.training.inputs import TrainInputs
from slm_ray.training.trainer import Trainer

shape = ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=128, n_layers=3, d_model=128, n_heads=4, d_ff=256)
config = TrainConfig(
    name="notebook", batch_size=16, max_steps=steps, workers=1, model=shape, optim=OptimConfig(lr=4e-3, warmup_steps=20)
)
inputs = TrainInputs(
    config=config,
    max_steps=steps,
    data_fingerprint="",
    folder=RunFolder(Path(tempfile.gettempdir()) / "slm-ray-notebook"),  # nothing is written there
    train=train,
    validation=validation,
    tokenizer=tokenizer,
    tracker=NullTracker(),
)
trainer = Trainer(inputs, TrainContext(), precision="fp32", is_compiled=False)
print(f"{sum(weight.numel() for weight in trainer.model.parameters()):,} parameters")

# %% [markdown]
"""
## Train

A model that knows nothing spreads its guess over all entries: its loss is ln(vocabulary). It falls fast at first, when
the frequent words are learned, then slowly.
"""

# %%
losses = []
for step in range(1, steps + 1):
    loss, _ = trainer.train_step()
    losses.append(loss.item())
    if step % max(1, steps // 5) == 0:
        found = trainer.validate()
        bits = f"{found.val_bits_per_byte:.4f} bits per byte"
        print(f"step {step}: {losses[-1]:.3f} nats; validation {found.val_loss:.3f}, {bits}")

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(7, 3.5))
plt.plot(losses)
plt.axhline(np.log(shape.vocab_size), color="black", linestyle="--", label="knowing nothing")
plt.xlabel("step")
plt.ylabel("training loss, nats a token")
plt.legend()
plt.show()

# %% [markdown]
"""
## Write

The temperature divides the logits: 0 takes the likeliest token always, 1 draws as the model believes, more is bolder.
"""

# %%
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend

prompt = "Once upon a time"
engine = Engine(TorchBackend(trainer.model.eval(), 3), tokenizer)
temperatures = (0.0, 0.7, 1.2)
asked = [SamplingParams(max_tokens=80, temperature=value, top_k=50, seed=1) for value in temperatures]
for value, written in zip(temperatures, engine.generate([prompt] * 3, asked), strict=True):
    print(f"temperature {value}: {prompt}{written.text}\n")

# %% [markdown]
"""
## What else might have stood there

The model gives a probability to every token of its vocabulary. Here the ones it thought likeliest, at each of the first
tokens of a greedy story.
"""

# %%
(written,) = engine.generate([prompt], [SamplingParams(max_tokens=12, temperature=0.0, logprobs=3)])
for one in written.logprobs:
    others = ", ".join(f"{text!r} {np.exp(logprob):.0%}" for _, text, logprob in one.top)
    print(f"{one.text!r:<14} {np.exp(one.logprob):>4.0%}   of {others}")

# %% [markdown]
"""
## What a notebook leaves out

Checkpoints that survive a kill, workers on several cores, a record of every run, a choice that is not made by hand, an
endpoint: `python slm_ray/train.py`, `python tune/sweep.py` and `python serve/app.py` do that with the same code.
"""

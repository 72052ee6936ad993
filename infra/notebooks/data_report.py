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
# The report of a data set, step by step

What `data/NAME/report/report.html` says, computed here from the data set's own files: how long the stories are, which
sequence length holds them, whether their words follow Zipf's law, and which tokens the vocabulary uses. Everything is
counted in the training split.

`make data` (or `python pipelines/prepare.py --runner DirectRunner`) makes the data set; start Jupyter in the checkout.
"""

# %% tags=["parameters"]
data = "data/tinystories"
decoded_stories = 2000  # words are counted in so many stories; tokens in all

# %%
import re
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.storage import storage_path
from slm_ray.tokenization.tokenizer import Tokenizer

folder = storage_path(data)
manifest = load_manifest(folder)
tokenizer = Tokenizer.load(folder / "tokenizer.json")
print("source      ", manifest.source)
print("counts      ", manifest.counts)
for name, split in manifest.splits.items():
    print(f"{name:<12} {split.rows:,} stories, {split.tokens:,} tokens, {split.bytes:,} bytes")
print("fingerprint ", manifest.fingerprint)

# %% [markdown]
"""
Every story is accounted for: read = kept + duplicates + rejected. The fingerprint names source, options and every byte.

## How long are the stories?

A shard has one row a story: its tokens, with the end-of-text token behind them, and the bytes of its cleaned text.
"""

# %%
shards = manifest.splits["train"].shards
rows = [pq.read_table(str(folder / shard.file), columns=["tokens", "n_bytes"]) for shard in shards]
lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for table in rows for chunk in table["tokens"].chunks])
n_bytes = np.concatenate([table["n_bytes"].to_numpy() for table in rows])

for name, values in (("tokens", lengths), ("bytes", n_bytes)):
    median, p95 = np.percentile(values, [50, 95], method="inverted_cdf")
    print(f"{name:<7} mean {values.mean():.1f}, median {median:.0f}, 95th percentile {p95:.0f}, longest {values.max()}")
print(f"{n_bytes.sum() / lengths.sum():.2f} bytes a token")

# %% [markdown]
"""
The sequence length that the report suggests is the smallest of 64, 128, 256, ... that holds the 95th percentile. A
model with a shorter one is trained on windows that cut stories; it costs less, and learns to begin in the middle.
"""

# %%
p95 = np.percentile(lengths, 95, method="inverted_cdf")
seq_len = 64
while seq_len < p95:
    seq_len *= 2
for length in (seq_len // 2, seq_len):
    print(f"{np.mean(lengths <= length):.1%} of the stories fit into {length} tokens")
print(f"python slm_ray/train.py --data {data} --model.seq-len {seq_len}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.hist(lengths, bins=60)
left.axvline(seq_len, color="black", linestyle="--", label=f"{seq_len} tokens")
left.set(xlabel="tokens a story", ylabel="stories")
left.legend()
right.plot(np.sort(lengths), np.linspace(0, 1, len(lengths)))
right.set(xlabel="sequence length, tokens", ylabel="share of stories that fit", xlim=(0, 2 * seq_len))
plt.show()

# %% [markdown]
"""
## Zipf's law

In a natural text the word of rank r occurs about 1/r times as often as the first. A line is fitted to the logarithms
of rank and count, over ranks that are spaced evenly in the logarithm: a slope near -1 is what language has; a list, a
table or a text that repeats itself has not.
"""

# %%
tokens, _ = read_split(folder, "train", manifest=manifest)
borders = np.flatnonzero(tokens == tokenizer.eos_id)[:decoded_stories]
parts = np.split(tokens[: borders[-1]], borders[:-1] + 1)  # a story each
stories = [tokenizer.decode(part[part != tokenizer.eos_id].tolist()) for part in parts]
words = Counter(word for story in stories for part in story.lower().split() if (word := re.sub(r"^\W+|\W+$", "", part)))
counts = np.array(sorted(words.values(), reverse=True))
ranks = np.unique(np.geomspace(min(10, len(counts)), min(1000, len(counts)), 100).round().astype(int))
slope, intercept = np.polyfit(np.log10(ranks), np.log10(counts[ranks - 1]), 1)
print(f"{counts.sum():,} words, {len(counts):,} different ones, {np.mean(counts == 1):.1%} of these seen once")
print(f"fitted slope {slope:.3f}")
print("most frequent:", ", ".join(word for word, _ in words.most_common(12)))

plt.figure(figsize=(6, 4))
plt.loglog(np.arange(1, len(counts) + 1), counts, ".", markersize=3)
plt.loglog(ranks, 10 ** (intercept + slope * np.log10(ranks)), color="black")
plt.xlabel("rank of the word")
plt.ylabel("occurrences")
plt.show()

# %% [markdown]
"""
## The vocabulary

A token that hardly occurs is hardly learned, and its row of the embedding is weight for nothing. Many of them are a
sign of too large a `--vocab-size`.
"""

# %%
uses = np.bincount(tokens, minlength=tokenizer.vocab_size)
rare = np.sum((uses > 0) & (uses < 10))
print(f"{np.mean(uses > 0):.1%} of {tokenizer.vocab_size:,} tokens are used, {rare} less than 10 times")
print("longest:", sorted((tokenizer.decode([token]) for token in range(tokenizer.vocab_size)), key=len)[-8:])

# %% [markdown]
"""
## A story as the model sees it

Each token between two bars. Most words are one token with the space before it; rare ones are cut.
"""

# %%
first = tokens[: np.flatnonzero(tokens == tokenizer.eos_id)[0]][:80]
print("|".join(tokenizer.decode([token]) for token in first.tolist()))

"""nanoGPT's recipe on the CPU, for `train.py`: GPT-2's shape, fp32, torch.compile, AdamW, random windows.

Written from its published settings (karpathy/nanoGPT, README and train.py): LayerNorm without bias, GELU of width 4 d,
learned positions, tied embeddings, no biases; AdamW 0.9 / 0.95, weight decay 0.1 on matrices, clip 1.0; windows at
random offsets of one token array; no autocast on a CPU. Arguments: see `peer_options.py`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from peer_options import FOREVER, Stopwatch, options
from torch import Tensor, nn

from slm_ray.config.files import load_config
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.storage import storage_path


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, steps, width = x.shape
        heads = (
            part.view(rows, steps, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(width, 2)
        )
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, steps, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, and the tied output layer."""

    def __init__(self, vocab_size: int, seq_len: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_output = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if is_output else 0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1), ignore_index=-1)


def main() -> None:
    """Train, and print the speed, until ended."""
    given = options()
    torch.set_num_threads(given.threads)
    torch.manual_seed(1337)
    shape = load_config(given.preset).model
    manifest = load_manifest(storage_path(given.data))
    tokens, _ = read_split(storage_path(given.data), "train", manifest=manifest)
    plain = GPT(int(manifest.tokenizer["vocab_size"]), shape.seq_len, shape.n_layers, shape.n_heads, shape.d_model)
    model = torch.compile(plain)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    watch = Stopwatch(given, shape.seq_len)
    for step in range(FOREVER):
        starts = torch.randint(len(tokens) - shape.seq_len, (given.batch_size,))
        windows = [torch.from_numpy(tokens[i : i + shape.seq_len + 1].astype(np.int64)) for i in starts.tolist()]
        batch = torch.stack(windows)
        loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.step(step)


if __name__ == "__main__":
    main()

"""`transformers.Trainer` with a Llama or Qwen3 of our shape, for `train.py`: what a user of transformers would write.

Arguments: see `peer_options.py`. bf16 where the hardware has it, as its users are told to; not compiled, its default.
"""

import tempfile
from typing import Any

import numpy as np
import torch
from peer_options import FOREVER, Stopwatch, options
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen3Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from slm_ray.config.files import load_config
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.storage import storage_path
from slm_ray.training.hardware import resolve_precision


class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Windows of the token stream, one after another."""

    def __init__(self, tokens: Any, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        window = self.tokens[number * self.seq_len : (number + 1) * self.seq_len].astype(np.int64)
        return {"input_ids": torch.from_numpy(window), "labels": torch.from_numpy(window)}


class Timer(TrainerCallback):  # type: ignore[misc]
    """Tells the stopwatch of each step."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.watch.step(state.global_step - 1)


def main() -> None:
    """Train, and print the speed, until ended."""
    given = options()
    torch.set_num_threads(given.threads)
    shape = load_config(given.preset).model
    manifest = load_manifest(storage_path(given.data))
    tokens, _ = read_split(storage_path(given.data), "train", manifest=manifest)
    named, more = (Qwen3Config, {"head_dim": shape.head_width}) if shape.qk_norm else (LlamaConfig, {})
    model = AutoModelForCausalLM.from_config(
        named(
            vocab_size=int(manifest.tokenizer["vocab_size"]),
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.seq_len,
            tie_word_embeddings=shape.tie_embeddings,
            attn_implementation="sdpa",
            **more,
        )
    )
    watch = Stopwatch(given, shape.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=resolve_precision("auto", torch.device("cpu")) == "bf16",
            per_device_train_batch_size=given.batch_size,
            max_steps=FOREVER,
            learning_rate=1e-3,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=Windows(tokens, shape.seq_len), callbacks=[Timer(watch)]).train()


if __name__ == "__main__":
    main()

"""Models that others made: random weights and a tokenizer of each family, written by transformers itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from slm_ray.corpus.grammar import sample_stories
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import SENTENCES

ENTRIES = 400
"""Of the tokenizers, about."""
TEXTS = [*sample_stories(0, 60), *SENTENCES]
CONTEXT = 64
SHAPES: Mapping[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "head_dim": 16, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
              "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "tie_word_embeddings": True},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT,
                "window_size": 8, "attention_types": [[["global", "local"], 1]], "tie_word_embeddings": True},
}  # fmt: skip


def llama_tokenizer() -> tokenizers.Tokenizer:
    """As Llama 2's: words begin with a mark for the space before them, characters that it lacks are bytes, and `<s>`
    is put before a text."""
    trained = tokenizers.Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    trained.normalizer = normalizers.Sequence(spaces)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=ENTRIES - 259, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(content["vocab"], key=content["vocab"].get)]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [tuple(merge) for merge in content["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(special)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def qwen_tokenizer() -> tokenizers.Tokenizer:
    """As Qwen's: bytes, text in NFC, three special tokens and none before a text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=ENTRIES, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


def gpt_tokenizer() -> tokenizers.Tokenizer:
    """As GPT-2's: bytes, and `<|endoftext|>`."""
    return tokenizers.Tokenizer.from_str(train_bpe(TEXTS, vocab_size=ENTRIES).to_json())


def write_foreign(folder: Path, kind: str, *, padding: int = 0, seed: int = 0, **changes: Any) -> Path:
    """A folder of a family, as transformers' `save_pretrained` leaves it; `padding` are rows that no token has."""
    tokenizer = {"llama": llama_tokenizer, "qwen3": qwen_tokenizer}.get(kind, gpt_tokenizer)()
    rows = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    ends = _ends(tokenizer, kind)
    config = transformers.AutoConfig.for_model(kind, vocab_size=rows + padding, **(SHAPES[kind] | ends | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero and one, so that a mix-up shows
            parameter.normal_(mean=0.02, std=0.2)
    if kind == "qwen3":
        model.generation_config.eos_token_id = [ends["eos_token_id"], ends["bos_token_id"]]
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _ends(tokenizer: tokenizers.Tokenizer, kind: str) -> dict[str, int]:
    names = {"llama": ("<s>", "</s>"), "qwen3": ("<|endoftext|>", "<|im_end|>")}
    bos, eos = names.get(kind, ("<|endoftext|>", "<|endoftext|>"))
    return {"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": tokenizer.token_to_id(eos)}


def opened_by_transformers(folder: Path) -> Any:
    """The model as transformers itself reads it, in fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_by_transformers(folder: Path, windows: list[list[int]]) -> tuple[float, int]:
    """Summed nats of all tokens of some windows but the first of each, and how many they are."""
    model, nats, count = opened_by_transformers(folder), 0.0, 0
    with torch.inference_mode():
        for ids in windows:
            tokens = torch.tensor([ids])
            nats += model(tokens, labels=tokens).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
    return nats, count

"""Every export of a model in the program that it is for, llama.cpp among them: `make bench-export`.

In: a trained model. Out: two tables on standard output: of each format and number format the largest error of a logit,
greedy tokens and ids that are equal, and bytes; of each family with random weights the same in llama.cpp. Then whether
llama.cpp writes torch's greedy story to the end of the context, and whether it gives our ids for every character of
Unicode's first planes and for many mixed texts.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slm_ray.config.schema import ModelConfig
from slm_ray.corpus.grammar import sample_stories
from slm_ray.exports.formats import DTYPES, FORMATS
from slm_ray.exports.gguf_files.file import Description, write_gguf
from slm_ray.exports.gguf_files.llamacpp import LlamaCppRuntime, slack
from slm_ray.exports.parity import TorchRuntime, compare, expected
from slm_ray.exports.source_model import SourceModel, opened
from slm_ray.exports.writing import export_model
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.training import train

PROMPT = "Once upon a time"
GPT: dict[str, Any] = {"norm": "layer", "mlp": "gelu", "positions": "learned", "bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, grouped queries, biases, untied": {"n_kv_heads": 2, "bias": True, "tie_embeddings": False},
    "Qwen3": {"qk_norm": True, "n_kv_heads": 2},
    "GPT-2": GPT,
}
CHARACTERS = [*range(1, 0xD800), *range(0xE000, 0x20000)]
PIECES = [
    *("the", "The", " the", "Lily", "didn't", '."', "aa", "aaa", "7", "123", "caf\u00e9", "\u65e5\u672c", "\U0001f600"),
    *(" ", "  ", "\n", "\t", "\u00a0", "\x1c", "\u0301", "\u200d", "<", "<s>", "</s>", "<0x41>", "<|", "|>"),
    *("'LL", "'s", "\u01c5", "\u00bd", "\u0663", "\r\n", "\u3000", "\u2028", "\u180e", "\u2167", "\u00b2", "i\u0307"),
]
MIXED_TEXTS = 20_000


def main() -> None:
    """Print the tables, and exit with 1 where llama.cpp gives other ids or another story."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models:/tinystories@champion", help="model to export")
    given = parser.parse_args()
    print("| --to | --dtype | Opened by | Largest logit error | Allowed | Greedy tokens | Ids of texts | MB |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for line in exports(given.model, Path(folder)):
            print(line, flush=True)
        print("\n| Random weights | llama.cpp's largest logit error | Allowed | Greedy tokens | Ids of texts |")
        print("|---|---|---|---|---|")
        for line in families(Path(folder)):
            print(line, flush=True)
        with opened(given.model) as given:
            is_same = story(given, Path(folder)) and ids(given, Path(folder))
    sys.exit(0 if is_same else 1)


def exports(model: str, folder: Path) -> Iterator[str]:
    """One row for each program that opens each export."""
    for to in FORMATS:
        for dtype in DTYPES[to]:
            output = folder / f"{to}-{dtype}"
            done = export_model(model, output, to, dtype)
            size = max(path.stat().st_size for path in output.iterdir()) / 1e6
            for found in done.checks:
                yield (
                    f"| {to} | {dtype} | {found.by} | {found.largest_logit_error:.2g} | {found.bound:.2g} | "
                    f"{found.greedy_tokens_equal} of {found.greedy_tokens} | "
                    f"{found.texts_with_equal_ids} of {found.texts} | {size:.1f} |"
                )


def families(folder: Path) -> Iterator[str]:
    """One row for each family that llama.cpp has."""
    tokenizer = train(map(str, sample_stories(0, 200)), 1024)
    for name, shape in FAMILIES.items():
        torch.manual_seed(1)
        config = ModelConfig(vocab_size=1024, seq_len=128, n_layers=3, d_model=128, n_heads=4, d_ff=256, **shape)
        model = Decoder(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        path = folder / "family.gguf"
        write_gguf(path, model, tokenizer, Description(name=name, license=""))
        with LlamaCppRuntime(path, tokenizer.stop_ids) as runtime:
            found = compare(runtime, expected(model, tokenizer), "f32", slack(config))
        yield (
            f"| {name} | {found.largest_logit_error:.2g} | {found.bound:.2g} | "
            f"{found.greedy_tokens_equal} of {found.greedy_tokens} | {found.texts_with_equal_ids} of {found.texts} |"
        )


def story(given: SourceModel, folder: Path) -> bool:
    """Whether torch and llama.cpp write the same greedy story up to the end of the context."""
    tokens = [given.tokenizer.start_id, *given.tokenizer.encode(PROMPT)]
    count = given.model.config.seq_len - len(tokens)
    ours = TorchRuntime(given.model, given.tokenizer.encode, given.tokenizer.stop_ids, "torch").write(tokens, count)
    with LlamaCppRuntime(next((folder / "gguf-f32").glob("*.gguf")), given.tokenizer.stop_ids) as runtime:
        theirs = runtime.write(tokens, count)
    print(f"\nthe greedy story of {len(ours)} tokens in llama.cpp is {'the same' if ours == theirs else 'another'}:")
    print(PROMPT + given.tokenizer.decode(theirs))
    return ours == theirs


def ids(given: SourceModel, folder: Path) -> bool:
    """Whether llama.cpp gives our ids."""
    chosen = random.Random(1)
    texts = [f"a {chr(code)}b" for code in CHARACTERS]
    texts += ["".join(chosen.choices(PIECES, k=chosen.randint(1, 12))) for _ in range(MIXED_TEXTS)]
    with LlamaCppRuntime(next((folder / "gguf-f32").glob("*.gguf")), given.tokenizer.stop_ids) as runtime:
        wrong = [text for text in texts if runtime.encode(text) != given.tokenizer.encode(text)]
    print(
        f"\nllama.cpp gives other ids for {len(wrong):,} of {len(texts):,} texts {[ascii(text) for text in wrong[:5]]}"
    )
    return not wrong


if __name__ == "__main__":
    main()

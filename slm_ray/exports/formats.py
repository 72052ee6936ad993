"""What a model can be written as, and which number formats each takes.

In: the words of `--to` and `--dtype`. Out: the formats that are meant, or why they are refused.
"""

from typing import Literal

Format = Literal["hf", "gguf", "onnx"]
Target = Literal["hf", "gguf", "onnx", "all", "checkpoint"]
Dtype = Literal["f32", "f16", "bf16", "q8_0", "int8"]

FORMATS: tuple[Format, ...] = ("gguf", "hf", "onnx")
"""In the order in which `all` writes them: the one that refuses most models is first."""
DTYPES: dict[Target, tuple[Dtype, ...]] = {
    "hf": ("f32", "f16", "bf16"),
    "gguf": ("f32", "f16", "bf16", "q8_0"),
    "onnx": ("f32", "int8"),
    "all": ("f32",),
    "checkpoint": ("f32",),
}
GGUF_ENDS = 3
"""Tokens that end a text, as many as a GGUF file names: `eos_token_id`, `eot_token_id`, `eom_token_id`."""


def misfit(to: Target, dtype: Dtype) -> str:
    """Why a format cannot be written in a number format; empty where it can."""
    if dtype in DTYPES[to]:
        return ""
    others = [name for name in FORMATS if dtype in DTYPES[name]]
    return f"--to {to} takes --dtype {' or '.join(DTYPES[to])}, not {dtype}, which is of {' and '.join(others)}"

"""The shape of the decoder: one frozen dataclass, checked once when it is made.

In: fields, from `files` or `options`. Out: a `ModelConfig`, as part of `schema.TrainConfig` and out of every model's
folder.
"""

import dataclasses
from typing import ClassVar, Literal

from pydantic import ConfigDict

from slm_ray.config.checks import require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the decoder. The defaults are Llama's; each departure is a field."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    vocab_size: int = 0
    """Entries of the tokenizer; 0 takes the data set's."""
    seq_len: int = 128
    """Context in tokens: the length of a training sample and of the attention window."""
    n_layers: int = 4
    """Decoder blocks."""
    d_model: int = 256
    """Width of the residual stream."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 0
    """Key and value heads, a divisor of n_heads (grouped-query attention); 0 means n_heads."""
    d_head: int = 0
    """Width of a head; 0 means d_model / n_heads."""
    d_ff: int = 704
    """Inner width of the feed-forward block."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward: gated SiLU with three matrices, or GELU (tanh form) with two."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm (with a bias where `bias` is set). Always before the block (pre-norm)."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary position embedding, or a learned vector a position added to the token's."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    bias: bool = False
    """Biases in the linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of query, key and value; as `bias` says when not given."""
    o_bias: bool | None = None
    """Bias of the attention's output projection; as `bias` says when not given."""
    mlp_bias: bool | None = None
    """Biases of the feed-forward block; as `bias` says when not given."""
    qk_norm: bool = False
    """RMSNorm over every head's query and key, after their projection and before the rotary turn (Qwen3)."""
    scale_attention: bool = True
    """Scores are divided by the root of the head's width; off, they stay as they are (GPT-Neo)."""
    local_window: int = 0
    """Tokens that every second block (the 2nd, 4th, ...) looks back on, its own included (GPT-Neo); 0: all, in every
    block."""
    dropout: float = 0.0
    """Share dropped after the embedding, in attention and after each block, while training; 0 to 1."""
    tie_embeddings: bool = True
    """The output layer shares the token embedding's weights."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it over sqrt(2 n_layers)."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "n_layers", "d_model", "n_heads", "d_ff"):
            require(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("vocab_size", "n_kv_heads", "d_head", "local_window"):
            require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")
        require(
            self.d_head > 0 or self.d_model % self.n_heads == 0,
            f"d_model ({self.d_model}) must be divisible by n_heads ({self.n_heads}), or d_head be given",
        )
        require(
            self.n_heads % self.kv_heads == 0,
            f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.kv_heads})",
        )
        require(
            self.positions != "rotary" or self.head_width % 2 == 0,
            f"rotary positions need an even head width, and it is {self.head_width}",
        )
        require(0 <= self.dropout < 1, f"dropout ({self.dropout}) must be at least 0 and below 1")
        for name in ("norm_eps", "rope_theta", "init_std"):
            require_positive(name, getattr(self, name))

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head, resolved."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have biases, resolved."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_o_bias(self) -> bool:
        """Whether the attention's output projection has a bias, resolved."""
        return self.bias if self.o_bias is None else self.o_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the feed-forward block has biases, resolved."""
        return self.bias if self.mlp_bias is None else self.mlp_bias

    @property
    def resolved(self) -> "ModelConfig":
        """The same shape in one spelling: what 0 or None leave open is filled in, and what has no effect is as by
        default. Two configs are the same model if these are equal."""
        is_local = self.n_layers > 1 and 0 < self.local_window < self.seq_len
        return dataclasses.replace(
            self,
            n_kv_heads=self.kv_heads,
            d_head=self.head_width,
            rope_theta=self.rope_theta if self.positions == "rotary" else ModelConfig.rope_theta,
            bias=self.bias and self.norm == "layer",
            qkv_bias=self.has_qkv_bias,
            o_bias=self.has_o_bias,
            mlp_bias=self.has_mlp_bias,
            local_window=self.local_window if is_local else 0,
        )

    def attention_span(self, layer: int) -> int:
        """Tokens that block `layer` (from 0) looks back on, its own included: the context, or a shorter window."""
        is_local = self.local_window > 0 and layer % 2 == 1
        return min(self.local_window, self.seq_len) if is_local else self.seq_len

"""The decoder-only transformer.

In: token ids. Out: logits, or the summed loss of given targets. Llama-shaped by default (pre-norm RMSNorm, rotary
positions, SwiGLU, no biases, tied embeddings); `ModelConfig` has a field for each departure. Parameter names are
those of transformers' `LlamaForCausalLM` without its `model.` prefix. The training loop calls `forward`, the engine
calls `decode`.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from slm_ray.config.schema import IGNORED_TARGET, ModelConfig
from slm_ray.model.blockwise_attention import blockwise_attention, suits
from slm_ray.model.further_targets import further_targets
from slm_ray.model.linear_cross_entropy import linear_cross_entropy, weighted_cross_entropy
from slm_ray.model.packed_rows import own_text
from slm_ray.model.rms_norm import RMSNorm
from slm_ray.model.rotary import rotary_tables, rotate
from slm_ray.model.shapes import shapes_only


@dataclasses.dataclass
class KVCache:
    """Keys and values of up to so many positions for each of B rows, which may be of different lengths."""

    keys: Tensor  # (n_layers, B, n_kv_heads, S, d_head)
    values: Tensor  # (n_layers, B, n_kv_heads, S, d_head)
    lengths: Tensor  # (B,) positions filled, int64

    @classmethod
    def empty(
        cls, config: ModelConfig, rows: int, device: torch.device | str = "cpu", *, positions: int = 0
    ) -> "KVCache":
        """Make a cache with nothing in it, in fp32, for so many positions or (0) the whole context."""
        shape = (config.n_layers, rows, config.kv_heads, positions or config.seq_len, config.head_width)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(torch.zeros(shape, device=device), torch.zeros(shape, device=device), lengths)


@dataclasses.dataclass(frozen=True)
class _Window:
    """What the layers of one pass share: where the new tokens stand, and what they may see."""

    cos: Tensor | None  # (B or 1, T, 1, d_head), None with learned positions
    sin: Tensor | None
    cache: KVCache | None = None
    positions: Tensor | None = None  # (B, T), with a cache
    mask: Tensor | None = None  # (B, 1, T, S) True where a query may look, with a cache or several texts a row
    local_mask: Tensor | None = None  # the same in local blocks, (1, 1, T, T) without a cache; None as `mask`

    def seen_by(self, is_local: bool) -> Tensor | None:
        """The mask of a block; None is all that stands before."""
        return self.local_mask if is_local and self.local_mask is not None else self.mask


class Attention(nn.Module):
    """Causal self-attention with optional grouped queries (Ainslie et al., arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.d_head = config.head_width
        self.is_grouped = config.n_heads != config.kv_heads
        self.is_local = config.attention_span(layer) < config.seq_len
        self.scale = None if config.scale_attention else 1.0  # None is 1 / sqrt(d_head)
        self.dropout = config.dropout
        self.q_proj = nn.Linear(config.d_model, config.n_heads * self.d_head, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(config.d_model, config.kv_heads * self.d_head, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(config.d_model, config.kv_heads * self.d_head, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(config.n_heads * self.d_head, config.d_model, bias=config.has_o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.d_head, eps=config.norm_eps)
            self.k_norm = RMSNorm(self.d_head, eps=config.norm_eps)
        self.has_qk_norm = config.qk_norm

    def forward(self, x: Tensor, window: _Window) -> Tensor:
        """x: (B, T, d_model) -> the same shape."""
        rows, steps, _ = x.shape
        q = self.q_proj(x).view(rows, steps, -1, self.d_head)  # (B, T, H, d_head)
        k = self.k_proj(x).view(rows, steps, -1, self.d_head)  # (B, T, Hkv, d_head)
        v = self.v_proj(x).view(rows, steps, -1, self.d_head)  # (B, T, Hkv, d_head)
        if self.has_qk_norm:
            q, k = _in_fp32(self.q_norm, q), _in_fp32(self.k_norm, k)
        if window.cos is not None and window.sin is not None:  # before the transpose, while they lie in one piece
            q, k = rotate(q, window.cos, window.sin), rotate(k, window.cos, window.sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or Hkv, T, d_head)
        if window.cache is not None:
            k, v = self._through_cache(k, v, window)  # (B, Hkv, S, d_head)
        y = self._attend(q, k, v, window.seen_by(self.is_local))  # (B, H, T, d_head)
        y = y.transpose(1, 2).reshape(rows, steps, -1)  # (B, T, H * d_head)
        return self.o_proj(y)  # type: ignore[no-any-return]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if suits(q, k, dropout):
            return blockwise_attention(q, k, v, scale=self.scale, mask=mask, dropout=dropout)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.is_grouped,
        )

    def _through_cache(self, k: Tensor, v: Tensor, window: _Window) -> tuple[Tensor, Tensor]:
        assert window.cache is not None and window.positions is not None and window.mask is not None
        keys, values = window.cache.keys[self.layer], window.cache.values[self.layer]
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
        keys[rows, :, window.positions] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, window.positions] = v.transpose(1, 2).to(values.dtype)
        seen = window.mask.shape[-1]
        return keys[:, :, :seen].to(k.dtype), values[:, :, :seen].to(v.dtype)


def _in_fp32(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm in its weights' precision, whatever autocast made of x; the result is x's."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Gated feed-forward, `down(silu(gate(x)) * up(x))` (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=config.has_mlp_bias)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.has_mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.has_mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d_model) -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Gelu(nn.Module):
    """Plain feed-forward with GELU's tanh form, as GPT-2 has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.has_mlp_bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.has_mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, d_model) -> the same shape."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))  # type: ignore[no-any-return]


def _norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class Block(nn.Module):
    """Attention, then feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = _norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else Gelu(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, window: _Window) -> Tensor:
        """x: (B, T, d_model) -> the same shape."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), window))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The model. Positions beyond `config.seq_len` are refused: shift the context instead (see `engine.py`)."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size must be resolved before the model is built"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.seq_len, config.d_model)
        else:
            cos, sin = rotary_tables(config.seq_len, config.head_width, config.rope_theta)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = _norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._init_weights()

    def _init_weights(self) -> None:
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue  # norms start at one, biases at zero
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers) if is_output else std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        places: Tensor | None = None,
        further: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the summed loss.

        tokens: (B, T) ids, T at most seq_len. targets: (B, T) ids of the following tokens, IGNORED_TARGET where none.
        places: (B, T) how far each token lies behind the beginning of its text, where a row holds several: it sees no
        other text then, and its position is that place. Without, a row is one text.
        further: (K,) weights in fp32 of the K tokens after the next one, which each place is asked for too.
        Returns logits (B, T, vocab_size), or with targets the sum of their negative log likelihoods in nats, fp32. With
        `further` two sums, (2,): that with the weighted further tokens, to be differentiated, and the plain one.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        if places is None:
            window = self._window(positions[None], positions)
        else:
            window = self._window(places, places[:, None, None], mask=own_text(places))
        hidden = self._hidden(tokens, window)
        if targets is None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        flat = hidden.flatten(0, 1)  # (B * T, d_model)
        if further is None:
            return linear_cross_entropy(flat, self.lm_head.weight, targets.reshape(-1), IGNORED_TARGET)
        several = further_targets(targets, len(further), places).flatten(0, 1)  # (B * T, 1 + K)
        shares = torch.cat((further.new_ones(1), further))
        return weighted_cross_entropy(flat, self.lm_head.weight, several, shares, IGNORED_TARGET)

    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append tokens to every row of the cache and give the logits that follow them.

        tokens: (B, T); each row continues at its own length, which grows by T. Returns (B, T, vocab_size).
        """
        steps = tokens.shape[1]
        ahead = torch.arange(steps, device=tokens.device)
        positions = cache.lengths[:, None] + ahead  # (B, T)
        seen = int(positions.max()) + 1
        hidden = self._hidden(tokens, self._window(positions, torch.arange(seen, device=tokens.device), cache))
        cache.lengths += steps
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def _window(
        self, positions: Tensor, seen: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> _Window:
        """positions: (B or 1, T) of the new tokens. seen: (S,) or (B, 1, 1, S) of the tokens before and among them."""
        is_local, local_mask = 0 < self.config.local_window < seen.shape[-1], None
        if is_local or cache is not None:
            behind = positions[:, None, :, None] - seen  # (B or 1, 1, T, S) tokens between
            mask = mask if cache is None else behind >= 0
            if is_local:
                local_mask = (behind < self.config.local_window) & (behind >= 0 if mask is None else mask)
        if self.config.positions == "learned":
            return _Window(None, None, cache, positions, mask, local_mask)
        cos, sin = self.rotary_cos[positions], self.rotary_sin[positions]  # (B or 1, T, d_head)
        return _Window(cos[:, :, None], sin[:, :, None], cache, positions, mask, local_mask)

    def _hidden(self, tokens: Tensor, window: _Window) -> Tensor:
        """What the output layer reads: (B, T, d_model)."""
        x = self.embed_tokens(tokens)  # (B, T, d_model)
        if self.config.positions == "learned":
            x = x + self.embed_positions(window.positions)
        x = self.dropout(x)
        for block in self.layers:
            x = block(x, window)
        return self.norm(x)  # type: ignore[no-any-return]


def parameter_count(config: ModelConfig) -> int:
    """Weights of a model of this shape, counted without allocating them."""
    with shapes_only():
        return count_parameters(Decoder(config))


def count_parameters(model: nn.Module) -> int:
    """Number of distinct trainable weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())

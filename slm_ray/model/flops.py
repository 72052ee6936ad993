"""What a token costs, in floating-point operations, by the model's shape.

In: a `ModelConfig`. Out: operations a token of training. Source: Chowdhery et al., "PaLM" (arXiv:2204.02311), app. B.
"""

from slm_ray.config.schema import ModelConfig


def matmul_weights(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: of every linear layer, the output layer included, tied or not.

    A look-up in the token or position embedding multiplies nothing; norms and biases are left out.
    """
    attention = 2 * config.d_model * (config.n_heads + config.kv_heads) * config.head_width
    feed_forward = (3 if config.mlp == "swiglu" else 2) * config.d_model * config.d_ff
    return config.n_layers * (attention + feed_forward) + config.d_model * config.vocab_size


def train_flops_per_token(config: ModelConfig) -> int:
    """Operations of forward and backward for one token: 6 N + 12 d_attn x the spans of all blocks, d_attn = n_heads x
    d_head.

    N is `matmul_weights`. A block's span is the context, or its window where that is shorter. Attention counts as if it
    were not causal, as in the paper; what is computed twice (gradient checkpoints) counts once.
    """
    d_attn = config.n_heads * config.head_width
    spans = sum(config.attention_span(layer) for layer in range(config.n_layers))
    return 6 * matmul_weights(config) + 12 * d_attn * spans

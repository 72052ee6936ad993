"""One module for each family of transformers' models that a `ModelConfig` may be.

In: a `ModelConfig` and named weights, or a config.json and tensors that anybody wrote. Out: each as the other. The door
is `slm_ray.model.hf_layout`. May know: torch, config, errors.
"""

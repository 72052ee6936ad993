"""What a run leaves behind: checkpoints, its folder here or in an object store, its record, its outcome.

In: weights and state of a run. Out: folders that are complete or absent. May know: torch, safetensors, model,
tokenization, config, storage, errors.
"""

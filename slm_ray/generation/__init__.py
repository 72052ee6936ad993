"""Stories from a model: requests, the batching engine, and the backends that execute the model.

In: prompts and sampling parameters. Out: tokens and text, as they come or whole. May know: torch, onnx and onnxruntime
(in two files), model, tokenization, config, errors.
"""

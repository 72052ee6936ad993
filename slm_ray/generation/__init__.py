"""Stories from a model: requests, the batching engine, and the backends that execute the model.

In: prompts and sampling parameters. Out: tokens and text, as they come or whole. May know: torch, onnx (in
`graph/` and one file) and onnxruntime (in one), model, tokenization, config, errors.
"""

"""Parts of the decode graph: its builder, its products in fp32 and int8, and the scales of a cache in int8.

In: weights of a model. Out: operators and numbers. `onnx_graph.py` and `onnx_backend.py` ask here.
"""

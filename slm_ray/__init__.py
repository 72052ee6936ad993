"""SLM-Ray: a folder of stories in, a small language model behind an HTTP endpoint out.

The core of the system: text, tokens, shards, batches, the model, the training loop, checkpoints and generation.
It knows neither Beam nor Ray nor MLflow, but for `train.py` (Ray Train) and `tracking.py` (MLflow).
"""

__version__ = "0.1.0"

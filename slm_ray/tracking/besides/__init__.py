"""Trackers that a run may have besides MLflow: TensorBoard's event files, Weights & Biases.

In: metrics and samples of rank 0. Out: what each of them shows. Optional packages; one that fails costs a warning.
"""

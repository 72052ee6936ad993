"""Where runs are recorded and models registered. MLflow, TensorBoard and wandb are known here only.

In: metrics, parameters and files of a run; a checkpoint to register; a reference to a model. Out: MLflow runs and
versions, event files, the folder of a checkpoint. May know: mlflow, tensorboard, wandb, runs, errors.
"""

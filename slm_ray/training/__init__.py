"""One rank's part of a run, in plain torch, without Ray.

In: a resolved `TrainConfig`, a data set, and a sum over the ranks. Out: checkpoints and a record in the
run's folder. May know: torch and all rooms below; not Ray.
"""

"""A run over many processes: Ray core and Ray Train are known here only.

In: a `TrainConfig`. Out: a finished run, watched while it goes, its workers started again when they are lost. May know:
ray and all rooms below.
"""

"""Where a step's time goes: `--profile`.

In: a run, while it trains. Out: a trace and two tables in its folder: by part of the step, and by torch's operators.
"""

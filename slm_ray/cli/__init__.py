"""How a command starts and ends: its path and environment, a free port, signals, exit codes.

In: a command's `main`. Out: the same with one line and an exit code for every way it can end. May know: errors.
"""

"""How a run ended: the words of `summary.json`."""

FINISHED = "finished"
DIVERGED = "diverged"
STOPPED = "stopped"
UNSAVED = "unsaved"

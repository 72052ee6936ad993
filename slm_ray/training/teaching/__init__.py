"""Other models that a run learns from."""

"""The model that a replica serves, and how another version takes its place.

In: a reference to a model. Out: an engine that answers, the newest one that the reference leads to. May know: the
generation, tracking and runs rooms; not Ray Serve, not HTTP.
"""

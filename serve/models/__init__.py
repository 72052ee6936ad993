"""The model that a replica serves, and how another version takes its place.

In: a reference to a model. Out: an engine that answers, with the newest version that the reference leads to. May know:
the rooms of `slm_ray` below `distributed`; not Ray Serve, not HTTP.
"""

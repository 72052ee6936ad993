"""Who may write to a place: one at a time, on one machine or on several.

In: a folder, or the address of an object store. Out: a block within which nobody else has it. May know: storage,
periodic, errors.
"""

"""What can be set, and how it is read.

In: options, presets and YAML files. Out: frozen dataclasses, checked once. May know: errors, storage.
"""

"""GGUF, the format of llama.cpp: written, read back, and opened by llama.cpp itself where that is installed."""

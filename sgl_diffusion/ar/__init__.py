"""Models that write token by token, driven step by step over the classes of transformers."""

"""Rank 5: parallelism, applied to a built model from outside."""

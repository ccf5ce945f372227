"""Rank 3: the layers models are built from."""

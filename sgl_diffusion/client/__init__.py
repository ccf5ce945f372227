"""Rank 8: the one Python door to the engine. Never imports torch."""

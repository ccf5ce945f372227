"""Rank 4: transformers, one family per file, with a table of its checkpoint names beside it."""

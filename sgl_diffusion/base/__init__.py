"""Rank 0: what every room may use and that uses no other room."""

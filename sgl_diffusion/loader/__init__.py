"""Rank 1: finds models and reads their files."""

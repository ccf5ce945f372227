"""Rank 1: the ranks of one stage: who they are, what they exchange, how tokens are shared out."""

"""Rank 1: jobs, stages and their supervision. Knows nothing of diffusion or HTTP."""

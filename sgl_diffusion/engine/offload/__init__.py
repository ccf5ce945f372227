"""Weights that are away until they are needed: in the checkpoint, or in the memory of the host."""

"""Adapters (LoRA) on the components of a running pipeline: merged for all jobs, or row by row."""

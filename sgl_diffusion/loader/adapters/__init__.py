"""Adapters (LoRA and its kin): files of every convention, read into one type."""

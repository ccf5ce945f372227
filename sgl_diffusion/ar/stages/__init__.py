"""The stages of an omni model; `ar/worker.py` puts those of one process together."""

"""Rank 4: what stands around a transformer: text encoders, VAEs and samplers."""

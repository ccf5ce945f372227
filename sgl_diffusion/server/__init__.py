"""Rank 9: HTTP. Never imports torch; the work happens behind `client`."""

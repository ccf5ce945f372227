"""Rank 10: the commands. The only room that reads argv; imports nothing heavy before it must."""

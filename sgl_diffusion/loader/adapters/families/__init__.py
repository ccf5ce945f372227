"""How the files of each model family name its layers: one table per family."""

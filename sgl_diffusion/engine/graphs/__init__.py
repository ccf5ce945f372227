"""CUDA graphs of denoise steps: when to make one, what is kept, and the captured pass itself."""

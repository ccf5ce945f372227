"""Triton kernels, installed as `sgl_diffusion.kernels`; `ops/` calls their launch functions."""

"""STIV: flow matching over latents by a diffusion transformer with factorised attention (arXiv 2412.07730)."""

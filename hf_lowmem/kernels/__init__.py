"""Triton kernels, each beside its reference. None yet: every codec runs as plain torch operators."""

"""Parts of optimizers.py: bytes, seconds and loss of optimizers side by side."""

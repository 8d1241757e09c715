"""Parts of activations.py: saved activations by tier."""

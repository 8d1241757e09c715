"""Parts of scripts/bench/products.py."""

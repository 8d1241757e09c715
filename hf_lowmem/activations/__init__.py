"""Saved activations in fewer bytes. Nothing yet: `lowmem_activations` is refused."""

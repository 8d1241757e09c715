"""The command `hf-lowmem`; see `main`."""

"""`hf-lowmem doctor`: what this machine has, what is missing and costs what, and whether the kernels are right here."""

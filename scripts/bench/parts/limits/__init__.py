"""How far compiled kernels are from what a GPU's memory allows, counted in their instructions, without a GPU."""

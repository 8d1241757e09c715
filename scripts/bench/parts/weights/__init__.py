"""Stores of weights side by side: the loss that each costs beside fp32 masters, on the small Llama."""

"""Common part of the fused steps (adamw, lion, apollo): finite gradients, states, weights, launches."""

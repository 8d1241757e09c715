"""What the fused optimizer steps (adamw, lion, apollo) share: soundness of gradients, states, weights, launches."""

"""What the fused optimizer steps (adamw, lion, apollo) share: gradients that are finite, states, weights, launches."""

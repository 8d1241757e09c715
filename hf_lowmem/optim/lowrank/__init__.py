"""The low-rank family: project the gradient, keep Adam's moments of the projection, lift the direction by a rule."""

"""The low-rank family: project the gradient, keep Adam's moments there, project the direction back by a rule."""

"""Origin of a tensor inside attention: whether it is an activation of the layer's tokens, or a bias.

A bias on attention's scores has the shape of an activation where its first dimension is as long as the batch, and a
gradient where it is learned (T5's relative positions). Coded in groups it would be lost: it holds a mask's -inf, beside
which all else in a group is zero. Its values cannot be looked at without waiting for the device, so its graph is.
"""

from collections.abc import Container
from typing import Any

__all__ = ["is_bias", "is_masked"]

# Nodes that give the same values, or all of them scaled, capped or moved.
PASS = (
    *("Alias", "AsStrided", "Clamp", "Clone", "Copy", "Div", "Expand", "Maximum", "Minimum", "Mul", "Permute"),
    *("ReshapeAlias", "Select", "Slice", "Split", "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze"),
    *("Unbind", "UnsafeSplit", "View"),
)
PASSING = tuple(f"{name}Backward" for name in PASS)
# Nodes that write constants into a tensor.
MASKING = tuple(f"{name}Backward" for name in ("MaskedFill", "MaskedScatter", "IndexFill", "Tril", "Triu", "Where"))
SUMS = ("AddBackward0", "SubBackward0")
# Matrix products, and operators of which nothing is known.
MIXING = ("Addmm", "Baddbmm", "Bmm", "Mm", "Linear", "Convolution")
# A bias is few operators away from its parameter: what is further away is an activation.
FAR = 48


def is_masked(node: Any) -> bool:
    """Whether a constant was added to what `node` has made, or written into it."""
    for _ in range(FAR):
        name = node.name()
        if name.startswith(MASKING):
            return True
        edges = [edge[0] for edge in node.next_functions]
        inputs = [edge for edge in edges if edge is not None]
        if name in SUMS:
            return len(inputs) < len(edges)
        if not name.startswith(PASSING) or len(inputs) != 1:
            return False
        node = inputs[0]
    return False


def is_of_parameters(node: Any, activations: Container[Any], constants: bool) -> bool:
    """Whether parameters, and constants, are all that `node` has been made of.

    activations: nodes that have made such. constants: whether a matrix product with a constant is no activation, which
    it is where the layer's own input has no gradient.
    """
    pending, seen = [node], 0
    while pending:
        node, seen = pending.pop(), seen + 1
        if seen > FAR or node in activations:
            return False
        if getattr(node, "variable", None) is not None:
            continue
        if not constants and (node.name().startswith(MIXING) or not node.name().endswith(tuple("0123456789"))):
            return False
        pending += [edge[0] for edge in node.next_functions if edge[0] is not None]
    return True


def is_bias(node: Any, activations: Container[Any], constants: bool) -> bool:
    """Whether what `node` has made must be kept exactly: masked, or no activation."""
    return is_masked(node) or is_of_parameters(node, activations, constants)

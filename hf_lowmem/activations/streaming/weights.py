"""Weights of a streamed layer: those that get a gradient, and what stands in their place while chunks run in backward.

`torch.autograd.grad` calls the hooks of a tensor that it is asked for. Asked for a weight chunk by chunk, it would call
those that a user has put on it with parts of the gradient; so chunks run with detached tensors of the same memory, and
the weight's own hooks see its gradient once, when the layer's node hands it over.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

__all__ = ["standing_in", "trained"]


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Weights that get a gradient, each once."""
    return [p for p in module.parameters() if p.requires_grad]


@contextlib.contextmanager
def standing_in(module: nn.Module, weights: Sequence[nn.Parameter], leaves: Sequence[Tensor]) -> Iterator[None]:
    """A context in which other tensors are in the place of weights, whose own hooks must not see a chunk's gradient."""
    given = {id(p): leaf for p, leaf in zip(weights, leaves, strict=True)}
    places = [(m._parameters, name, p) for m in module.modules() for name, p in m._parameters.items() if id(p) in given]
    try:
        for of_module, name, p in places:
            cast(dict[str, Tensor | None], of_module)[name] = given[id(p)]
        yield
    finally:
        for of_module, name, p in places:
            of_module[name] = p

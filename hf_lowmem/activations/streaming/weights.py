"""Weights of a streamed layer: those that get a gradient, and what stands in their place while chunks run in backward.

`torch.autograd.grad` calls the hooks of a tensor that it is asked for. Asked for a weight chunk by chunk, it would call
those that a user has put on it with parts of the gradient; so chunks run with detached tensors of the same memory, and
the weight's own hooks see its gradient once, when the layer's node hands it over.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_lowmem.distributed import is_sharded

__all__ = ["gathered", "standing_in", "trained"]


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


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context in which a layer has its weights whole, also where FSDP2 has them in shards as it is not its turn."""
    if not any(map(is_sharded, module.parameters())):
        yield
        return
    if not isinstance(module, FSDPModule):
        raise RuntimeError(
            f"{type(module).__name__} runs again while its weights are in shards, which FSDP2 gathers for a module "
            "that is not the layer. Shard whole layers (fully_shard of each layer), or leave '/N' out of "
            "lowmem_activations, so that each layer keeps its input."
        )
    module.unshard()
    try:
        yield
    finally:
        module.reshard()

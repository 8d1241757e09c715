"""The linears of a model's decoder layers that multiply activations: those of attention and of MLPs.

Not the head, the embedding or a router, which stand outside of them; not the two small ones of an adapter, but the one
that it adapts; not experts, whose tokens are few and change from call to call.
"""

from collections.abc import Iterator

from torch import nn

from hf_lowmem.activations.detect import find_stack, is_linear, structure_of

__all__ = ["linears_of_layers"]


def linears_of_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linears inside of attention and MLPs, by name; none where no layers are recognised."""
    stack, layers, _ = find_stack(model)
    found: dict[str, nn.Module] = {}
    for index, layer in enumerate(layers):
        parts = structure_of(layer)
        for name, part in (*parts.attention.items(), *parts.mlp.items()):
            found |= _linears(part, f"{stack}.{index}.{name}" if name else f"{stack}.{index}")
    seen: set[int] = set()
    return {name: m for name, m in found.items() if not (id(m) in seen or seen.add(id(m)))}


def _linears(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):  # of an adapter
        yield from _linears(base, f"{name}.base_layer")
    elif is_linear(module):
        yield name, module
    else:
        for child_name, child in module.named_children():
            yield from _linears(child, f"{name}.{child_name}")

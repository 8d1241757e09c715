"""What a model consists of, by structure: its decoder layers, and in each of them attention, MLP and cheap parts.

Nothing here knows a model by name or class, and little depends on it being right. A module that is called cheap is run
twice instead of once and must do the same both times, which is tried here; how it computes is its own affair. Whether
a norm feeds a projection, or an activation a product, is read from the autograd graph at every forward pass
(hf_lowmem/activations/tape.py). So detection only says where to look, and how what is found there may be stored.

    linear      has in_features and out_features, or is GPT-2's Conv1D: plain, quantised or with adapters
    attention   two or more linears, and an attribute that counts heads
    mlp         two or more linears, and no such attribute
    cheap       no submodules, no weight of two dimensions, one tensor in and one of the same shape out
    the rest    with weights of three dimensions or a list of experts: left alone
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_lowmem.activations.draws import undrawn

__all__ = ["Structure", "find_stack", "is_linear", "structure_of"]

HEADS = ("head_dim", "head_size", "num_heads", "num_attention_heads", "num_key_value_groups", "n_heads")


@dataclass
class Structure:
    """The parts of one layer, name (relative to the layer) → module, and what was left alone: name → reason."""

    attention: dict[str, nn.Module] = field(default_factory=dict)
    mlp: dict[str, nn.Module] = field(default_factory=dict)
    projections: dict[str, nn.Module] = field(default_factory=dict)
    cheap: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("in_features", "out_features")) or (
        hasattr(module, "nf") and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    )


def has_experts(module: nn.Module) -> bool:
    """Weights of more than two dimensions (experts in one tensor, convolutions) or a list of MLPs."""
    if any(p.ndim > 2 for p in module.parameters()):
        return True
    lists = (m for m in module.modules() if isinstance(m, nn.ModuleList))
    return any(len(linears_of(item)) > 1 for found in lists for item in found)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if is_linear(child)}


def is_attention(module: nn.Module) -> bool:
    return len(linears_of(module)) > 1 and not has_experts(module) and any(hasattr(module, name) for name in HEADS)


def is_mlp(module: nn.Module) -> bool:
    return len(linears_of(module)) > 1 and not has_experts(module) and not any(hasattr(module, name) for name in HEADS)


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList, dict[str, str]]:
    """The decoder's layers: of all lists of modules with attention in each, the one with most weights.

    Returns its name, the list, and the other lists (a vision tower, an encoder): name → why it is left alone. The name
    of a list of no layers is "".
    """
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            attentive = [any(is_attention(m) for m in layer.modules()) for layer in module]
            # Hybrid models have attention in some of their layers only.
            if any(attentive) and not any(is_attention(m) for m in module):
                stacks[name] = module
    if not stacks:
        return "", nn.ModuleList(), {}
    best = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    others = {name: f"not the decoder: {best} has more weights" for name in stacks if name != best}
    return best, stacks[best], others


def structure_of(layer: nn.Module) -> Structure:
    """The parts of a layer that can be handled."""
    parts = Structure()
    linears: dict[str, nn.Module] = {}
    for name, module in walk(layer, ""):
        if is_attention(module):
            parts.attention[name] = module
        elif is_mlp(module):
            parts.mlp[name] = module
            linears = linears_of(module)
            # The last linear makes the output; which of the others read the MLP's input shows when they are called.
            parts.projections |= {f"{name}.{child}": linears[child] for child in list(linears)[:-1]}
        elif module is not layer and has_experts(module) and not is_linear(module):
            parts.left[name] = "experts or convolutions: its tensors stay as they are"
        elif is_linear(module) and not inside(name, {**parts.attention, **parts.mlp, **linears}):
            linears[name] = module
            parts.left[name] = "a linear outside of attention and MLP: its tensors stay as they are"
        elif not any(True for _ in module.children()) and not is_linear(module):
            reason = why_not_cheap(module)
            if reason is None:
                parts.cheap[name] = module
            elif reason:
                parts.left[name] = reason
    return parts


def inside(name: str, outer: dict[str, nn.Module]) -> bool:
    return any(name.startswith(f"{other}.") for other in outer)


def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules and their names, outer first, without the insides of what is left alone."""
    yield name, module
    if name and has_experts(module):
        return
    for child_name, child in module.named_children():
        yield from walk(child, f"{name}.{child_name}" if name else child_name)


def why_not_cheap(module: nn.Module) -> str | None:
    """None if the module may be replayed, "" if there is nothing to replay, else the reason against it."""
    if isinstance(module, nn.Identity | nn.Embedding | nn.ModuleList | nn.ModuleDict | nn.ParameterDict):
        return ""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "works in place" if module.inplace else None
    if any(p.ndim > 1 for p in module.parameters(recurse=False)):
        return f"{type(module).__name__} has a weight of two dimensions and is no linear"
    return why_not_replayable(module)


@torch.no_grad()
def why_not_replayable(module: nn.Module) -> str | None:
    """Try it on a small input, twice, as it is in training. Weights without values (meta, fake, sharded) are taken at
    their word: whether a run was repeatable is seen once more after each (hf_lowmem/activations/values.py)."""
    weight = next(module.parameters(recurse=False), None)
    if weight is not None and (type(weight) is not nn.Parameter or weight.is_meta):
        return None
    # A norm without weights knows its width by the name that torch gives it.
    width = getattr(module, "normalized_shape", (64,))[-1] if weight is None or not weight.ndim else weight.numel()
    like = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
    x = torch.linspace(-3.0, 3.0, 3 * width, **like).view(1, 3, width)
    if type(x) is not Tensor:
        return None
    twin = copy.copy(module)  # a trial must leave no trace in the model's statistics
    vars(twin)["training"] = True
    vars(twin)["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    before, versions = x.clone(), [t._version for t in (*twin.parameters(), *twin.buffers())]
    forward = type(module).forward
    try:
        with undrawn(x.device) as draws:
            first, second = forward(twin, x), forward(twin, x)
            drawn = draws.settle()
    except Exception as error:
        return "" if weight is None else f"does not run on one tensor: {type(error).__name__}: {error}"
    if not isinstance(first, Tensor) or first.shape != x.shape:
        return "" if weight is None else "its output is not one tensor of its input's shape"
    if not torch.equal(x, before):
        return "works in place"
    if drawn:
        return "draws random numbers: its tensors stay as they are"
    if not torch.equal(first, second) or versions != [t._version for t in (*twin.parameters(), *twin.buffers())]:
        return "gives another result, or has another state, when it runs again"
    return None

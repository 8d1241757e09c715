"""Structure of a model: its decoder layers, and in each of them attention, MLP and cheap parts.

Nothing here knows a model by name or class, and little depends on it being right. A module that is called cheap is run
twice instead of once and must do the same both times, which is tried here; how it computes is its own affair. Whether
a norm feeds a projection, or an activation a product, is read from the autograd graph at every forward pass
(hf_lowmem/activations/tape.py). So detection only says where to look, and how what is found there may be stored.

    linear      has in_features and out_features, or is GPT-2's Conv1D: plain, quantised or with adapters
    attention   two or more linears, and an attribute that counts heads
    mlp         two or more linears, and no such attribute
    cheap       no submodules, no weight of two dimensions, one tensor in and one of the same shape out
    the rest    with weights of three dimensions outside of linears, or a list of MLPs: left alone
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.activations.draws import undrawn

__all__ = ["Structure", "find_repeated", "find_stack", "is_linear", "routing_of", "structure_of"]

HEADS = ("head_dim", "head_size", "num_heads", "num_attention_heads", "num_key_value_groups", "n_heads")
# Parts of the names of what chooses by rank.
CHOICES = ("expert", "top_k", "topk", "router")
LOSSES = (nn.modules.loss._Loss, nn.LogSoftmax, nn.AdaptiveLogSoftmaxWithLoss)


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


def is_irregular(module: nn.Module) -> bool:
    """Whether a module has weights that no linear has, or a list of MLPs: convolutions, a recurrence, experts.

    What adapters put into a linear belongs to that linear, of however many dimensions it is.
    """
    if is_linear(module):
        return False
    if any(p.ndim > 2 for p in module.parameters(recurse=False)):
        return True
    if isinstance(module, nn.ModuleList) and any(len(linears_of(item)) > 1 for item in module):
        return True
    return any(is_irregular(child) for child in module.children())


def routing_of(layer: nn.Module) -> str | None:
    """Why a small change of a layer's input may change by a jump what it computes; None where nothing says so.

    A choice by rank (experts of which each token takes a few, keys of which each query takes a few) has no structure
    of its own. But whoever writes one gives the module its number: num_experts, top_k, index_topk.
    """
    found = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) and any(len(linears_of(item)) > 1 for item in module):
            found.append((name, "a list of MLPs"))
        for attribute, value in (*vars(module).items(), *module._modules.items()):
            counts = isinstance(value, nn.Module) or (type(value) is int and value > 1)
            if counts and any(sign in attribute.lower() for sign in CHOICES):
                found.append((f"{name}.{attribute}" if name else attribute, "a choice by rank"))
    experts = next((where for where, _ in found if "expert" in where.lower()), None)
    if experts is not None:
        return f"experts ({experts!r})"
    return f"{found[0][1]} ({found[0][0]!r})" if found else None


def what_is_irregular(module: nn.Module) -> str:
    """The first half of a report's sentence about a module that is left alone."""
    routing = routing_of(module)
    if routing is not None:
        return routing
    convolutions = any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
    return "convolutions" if convolutions else "weights of three dimensions"


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if is_linear(child)}


def is_attention(module: nn.Module) -> bool:
    return len(linears_of(module)) > 1 and not is_irregular(module) and any(hasattr(module, name) for name in HEADS)


def is_mlp(module: nn.Module) -> bool:
    return len(linears_of(module)) > 1 and not is_irregular(module) and not any(hasattr(module, name) for name in HEADS)


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList, dict[str, str]]:
    """The decoder's layers, of all lists of modules with attention in each.

    They are those of the decoder that makes the tokens, which the model names (`get_decoder`), and not of a tower that
    sees or hears inside of it; where that leaves several, those with most weights.

    Returns their name, the list, and the other lists (a vision tower, an encoder): name → why it is left alone. The
    name of a list of no layers is "".
    """

    def decodes(module: nn.Module) -> bool:
        attentive = [any(is_attention(m) for m in layer.modules()) for layer in module.children()]
        # Hybrid models have attention in some of their layers only.
        return isinstance(module, nn.ModuleList) and any(attentive) and not any(map(is_attention, module.children()))

    name, stack, others = _choose(model, _lists(model, decodes))
    return name, stack if isinstance(stack, nn.ModuleList) else nn.ModuleList(), others


def find_repeated(model: nn.Module) -> tuple[str, list[tuple[str, nn.Module]], dict[str, str]]:
    """The layers of a model of any structure, for tiers that need to know nothing about a layer.

    They are chosen as by `find_stack`, among all lists (or sequences) of modules with weights. In a model without any
    they are its own parts with weights, but for those that end in a loss: a rounded log-probability is another one.

    Returns the list's name ("" for the model's own parts), the layers by name, and the other lists.
    """

    def holds_layers(module: nn.Module) -> bool:
        containers = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict
        return isinstance(module, nn.ModuleList | nn.Sequential) and all(
            not isinstance(layer, containers) and any(True for _ in layer.parameters()) for layer in module
        )

    losses = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LOSSES))
    lists = {n: m for n, m in _lists(model, holds_layers).items() if not f"{n}.".startswith(losses)}
    name, stack, others = _choose(model, lists)
    if stack is not None:
        return name, [(f"{name}.{n}" if name else n, layer) for n, layer in stack.named_children()], others
    parts, prefix = dict(model.named_children()), ""
    while len(parts) == 1:  # wrappers
        (only, inner), *_ = parts.items()
        if not dict(inner.named_children()):
            break
        parts, prefix = dict(inner.named_children()), f"{prefix}{only}."
    layers = {f"{prefix}{n}": part for n, part in parts.items() if any(True for _ in part.parameters())}
    return "", [(n, part) for n, part in layers.items() if not any(isinstance(m, LOSSES) for m in part.modules())], {}


def _lists(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The outermost modules that are wanted and not empty, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in found)
        if outermost and any(True for _ in module.children()) and wanted(module):
            found[name] = module
    return found


def _choose(model: nn.Module, stacks: dict[str, nn.Module]) -> tuple[str, nn.Module | None, dict[str, str]]:
    """The decoder's list of layers among several: its name, the list, and why each of the others is not it."""
    ours = stacks
    host = next((m for m in model.modules() if callable(getattr(m, "get_decoder", None))), None)
    contrasts = hasattr(host, "get_text_features") and _ask(host, "get_output_embeddings") is None
    tokens = _ask(host, "get_input_embeddings")
    # Without tokens there is nothing to decode; of a contrastive model's towers none is the decoder.
    if isinstance(tokens, nn.Module) and any(isinstance(m, nn.Embedding) for m in tokens.modules()) and not contrasts:
        decoder = _ask(host, "get_decoder")
        # Some call a head so, or a transducer's recurrent predictor.
        if isinstance(decoder, nn.Module) and any(isinstance(m, nn.ModuleList) and len(m) for m in decoder.modules()):
            inside = {id(module) for module in decoder.modules()}
            ours = {name: stack for name, stack in stacks.items() if id(stack) in inside}
        ours = {name: stack for name, stack in ours.items() if not _perceives(model, name, ours)} or ours
    if not ours:
        return "", None, {}
    best = max(ours, key=lambda name: sum(p.numel() for p in ours[name].parameters()))
    why = {name: "has more weights" if name in ours else "makes the tokens" for name in stacks if name != best}
    return best, ours[best], {name: f"not the decoder: {best} {reason}" for name, reason in why.items()}


def _ask(host: Any, method: str) -> Any:
    """Result of a transformers model's own method, such as `get_decoder`; None where it has none or cannot tell."""
    try:
        return getattr(host, method)()
    except (AttributeError, NotImplementedError):
        return None


def _perceives(model: nn.Module, stack: str, stacks: Iterable[str]) -> bool:
    """Whether a list belongs to a tower that cuts images or sounds: the largest part around it without another list has
    convolutions before or after the layers."""
    tower, others = stack, [name for name in stacks if name != stack]
    while outer := tower.rpartition(".")[0]:
        if any(name.startswith(f"{outer}.") for name in others):
            break
        tower = outer
    layers = {id(m) for m in model.get_submodule(stack).modules()}
    around = (m for m in model.get_submodule(tower).modules() if id(m) not in layers)
    return bool(others) and any(isinstance(m, nn.modules.conv._ConvNd) for m in around)


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
        elif module is not layer and is_irregular(module):
            parts.left[name] = f"{what_is_irregular(module)}: its tensors stay as they are"
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
    if name and is_irregular(module):
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

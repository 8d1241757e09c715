"""Frozen models below adapters: each weight that is multiplied in 8 bits is coded once, and its codes alone are kept.

A byte a value in the place of two, and the same products to the bit, since the codes are those that each use would make
of the weight. What is trained, and what is saved, is the adapter: so nothing that would be saved is lost. A frozen
weight of a model without adapters stays, as a checkpoint of that model holds it; and so does one that its adapter
reads, as DoRA does for the norm of its rows.

What a training leaves behind is a model whose frozen weights are codes. It is evaluated and generated with, and saves
its adapters; whoever reads a weight, to merge an adapter into it, is told of `hf_lowmem.weights.wake`.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem.kernels.operands import FLOATS
from hf_lowmem.matmul.linear import frozen_codes
from hf_lowmem.matmul.products import RECIPES, code_weight
from hf_lowmem.weights import FrozenCodes, leave, save_adapter_alone

__all__ = ["agree", "keep_codes", "why_whole"]

# Modules of PEFT around a linear that ask for its product alone, and never for its weight.
ASK_FOR_PRODUCTS = ("peft.tuners.lora.layer", "peft.tuners.ia3.layer", "peft.utils.other")


def why_whole(model: nn.Module, linears: Mapping[str, nn.Module], recipe: str) -> dict[str, str | None]:
    """Frozen weights among those of linears, by name: why the weight is kept, None where codes alone will be.

    Raises:
        ValueError: where codes of another recipe are all that is there.
    """
    around = {id(child): parent for parent in model.modules() for child in parent.children()}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    adapted = bool(getattr(model, "peft_config", None))
    found: dict[str, str | None] = {}
    for name, module in linears.items():
        weight = module._parameters.get("weight")
        if weight is None or weight.requires_grad:
            continue
        if (kept := frozen_codes(module)) is not None:
            if kept.recipe != recipe:
                raise ValueError(
                    f"lowmem_matmul={recipe!r}: {kept.name} is {kept.said} since a training before. Set "
                    f"lowmem_matmul={kept.recipe!r}, or load the model anew."
                )
            found[name] = None
        elif not adapted:
            found[name] = "frozen, and part of the model that is saved"
        elif owners[id(weight)] > 1:
            found[name] = "frozen, and tied to another"
        elif is_traceable_wrapper_subclass(weight) or weight.dtype not in FLOATS or not weight.is_contiguous():
            found[name] = f"frozen, and a {type(weight).__name__} that is no plain matrix of floats"
        else:
            found[name] = _reads(around.get(id(module)))
    return found


def _reads(parent: nn.Module | None) -> str | None:
    """Why the weight of a linear must be there for the adapter around it."""
    if not isinstance(getattr(parent, "base_layer", None), nn.Module):
        return None
    kind = type(parent)
    if kind.__module__ not in ASK_FOR_PRODUCTS or getattr(parent, "lora_variant", None):
        return f"frozen, and read by its adapter ({kind.__module__.split('.')[-2]}, as with use_dora)"
    return None


def keep_codes(model: nn.Module, linears: Mapping[str, nn.Module], recipe: str) -> None:
    """Make codes of frozen weights that `why_whole` has nothing against, one after the other, and keep nothing else."""
    coding = {"recipe": recipe, "fmt": RECIPES[recipe].fmt, "encode": partial(code_weight, recipe=RECIPES[recipe])}
    for name, module in linears.items():
        if frozen_codes(module) is None:
            weight = module._parameters["weight"]
            assert isinstance(weight, nn.Parameter)
            leave(weight, FrozenCodes(f"{name}.weight", weight.detach(), **coding), [module])
    save_adapter_alone(model)
    ignored = [f"{name}.weight" for name in linears]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def agree(linears: Mapping[str, nn.Module]) -> None:
    """Send process 0's codes to all others, as DDP does with the weights that it reads."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for module in linears.values():
        if (kept := frozen_codes(module)) is not None:
            for tensor in kept.stored():
                dist.broadcast(tensor, 0)

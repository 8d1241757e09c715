"""Which weights of a model are at rest in int8 with weights="int8_sr", and which stay in bf16, with the reason.

At rest are the weights that a step trains and that only a layer of a known kind reads: of every nn.Linear and of
transformers' Conv1D but the output head, and of an embedding that is tied to nothing. They are 94 % of an 8B model.

The output head stays: trainers read it in pieces of their own, without calling its module. So do norms and biases,
which are small and in which a code's error would be one of every value of a token; weights that are frozen, which no
update rounds; fused experts, whose module multiplies by itself; and what is not bf16. Under FSDP2 the same weights rest
but those whose rows its processes do not share evenly (hf_lowmem/weights/shards.py).
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from hf_lowmem.memory.progress import counted
from hf_lowmem.optim.base import LOAD_BF16
from hf_lowmem.optim.groups import linear_weights
from hf_lowmem.optim.names import named_modules, named_parameters
from hf_lowmem.optim.roles import lookups
from hf_lowmem.specs import OptimSpec
from hf_lowmem.weights import at_rest, int8, put_to_rest, resting
from hf_lowmem.weights.forwards import forward_for
from hf_lowmem.weights.shards import managed, refused_setting, why_whole

__all__ = ["INT8", "Chosen", "check_awake", "check_rests", "choose", "rest"]

INT8 = "int8_sr"
FEW = 2.0**-6  # of a model's trained values: what stays because it is small needs no word


class Chosen(NamedTuple):
    """The weights of a model that rest, and why other weights of its matrices do not.

    Attributes:
        weights: (name, parameter, modules whose weight it is).
        values: how many of the trained are at rest, and how many there are.
        left: reason → values that stay in bf16 for it.
    """

    weights: list[tuple[str, nn.Parameter, list[nn.Module]]]
    values: tuple[int, int]
    left: dict[str, int]

    def __str__(self) -> str:
        rest, every = self.values
        why = "; ".join(f"{count:,} stay in bf16: {reason}" for reason, count in self.left.items())
        return f"{rest:,} of {every:,} trained weights are at rest in int8" + (f"; {why}" if why else "")


def choose(model: nn.Module) -> Chosen:
    """See the module; the model stays as it is."""
    cut = managed(model)
    linear = {id(p) for _, _, p in linear_weights(model)}
    _, heads = lookups(model)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, _, module in named_modules(model):
        for own, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append((module, own))
    weights: list[tuple[str, nn.Parameter, list[nn.Module]]] = []
    left: Counter[str] = Counter()
    rest = every = 0
    for _, name, p in named_parameters(model):
        if not p.requires_grad:
            continue
        every += p.numel()
        reason = _stays(p, owners[id(p)], linear=id(p) in linear, head=id(p) in heads)
        if reason is None and cut:
            reason = why_whole(p, cut.get(id(p)))
        if reason is None:
            weights.append((name, p, [module for module, _ in owners[id(p)]]))
            rest += p.numel()
        elif reason:
            left[reason] += p.numel()
    return Chosen(weights, (rest, every), dict(left))


def _stays(p: nn.Parameter, owners: list[tuple[nn.Module, str]], *, linear: bool, head: bool) -> str | None:
    """Why a parameter stays as it is; None where it rests, "" where it is too small to speak of."""
    if p.ndim < 2:
        return ""
    if head:
        return "the output head, and what is tied to it"
    if at_rest(p) is not None:
        return None
    if p.dtype != torch.bfloat16:
        return f"{str(p.dtype).removeprefix('torch.')} weights"
    if int8.group_of(p.shape) is None:
        return "rows that 32 does not divide"
    known = all(own == "weight" and forward_for(module) is not None for module, own in owners)
    table = all(isinstance(module, nn.Embedding) for module, _ in owners)
    if not known or not (linear or table) or not p.is_contiguous():
        return "read by modules other than nn.Linear, Conv1D and nn.Embedding, or by a forward that was put there"
    return None


def check_rests(spec: OptimSpec, model: nn.Module) -> Chosen:
    """Raise where weights="int8_sr" cannot be had of a model.

    Raises:
        ValueError: naming the field, the reason and the remedy.
    """
    asked = f"{spec.label('weights')}={spec.weights!r}"
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{asked} cannot be combined with adapters (PEFT): it is for trained weights, and the model's "
            "are frozen. Load the model with BitsAndBytesConfig(load_in_8bit=True), or leave it unset."
        )
    for known in managed(model).values():
        if (setting := refused_setting(known)) is not None:
            raise ValueError(f"{asked} cannot be combined with {setting} of FSDP2: {SHARDED}.")
    found = choose(model)
    if not found.weights:
        why = "; ".join(found.left) or "it has no matrix"
        raise ValueError(
            f"{asked} has no effect: no trained bfloat16 weight of {type(model).__name__} can be at rest ({why}). "
            f"{LOAD_BF16}"
        )
    return found


SHARDED = (
    "codes are gathered among all processes that share a weight, on their devices. Set reshard_after_forward to True "
    "or False and offload nothing, or set lowmem_weights='bf16_sr'"
)


def check_awake(spec: OptimSpec, model: nn.Module) -> None:
    """Raise where weights are at rest from a training before, and this optimizer would read their values."""
    name = next(iter(resting(model)), None)
    if name is not None:
        raise ValueError(
            f"{spec.label('weights')}={spec.weights!r} cannot be combined with a model whose weights are at rest in "
            f"int8 ({name}), by a training with {spec.label('weights')}={INT8!r}. Call hf_lowmem.weights.wake(model) "
            "first."
        )


def rest(
    spec: OptimSpec,
    model: nn.Module,
    folder: str | Path | None = None,
    *,
    shown: bool = True,
    optimizer: Optimizer | None = None,
) -> Chosen:
    """Put a model's weights to rest; again does nothing.

    Args:
        folder: of the saved model that the weights are from, if not that which the model says of itself.
        shown: whether a long conversion has a progress bar.
        optimizer: ours, which was made for the weights before FSDP2 has cut them: by `from_spec(later=True)`.
    """
    found = check_rests(spec, model)
    own = getattr(model, "name_or_path", None)
    weights = counted(found.weights, f"{spec.label('weights')}={spec.weights}", shown=shown)
    put_to_rest(model, weights, folder or (own if isinstance(own, str) and own and Path(own).is_dir() else None))
    for group in () if optimizer is None else (optimizer.defaults, *optimizer.param_groups):
        group["weights"] = spec.weights
    return found

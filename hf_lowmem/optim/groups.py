"""Parameter groups of a model: with names, split by weight decay, low-rank targets and experts apart.

A group says everything about its parameters in plain values, because FSDP2 replaces the entries of
`group["params"]` after the optimizer was made: knowledge kept in a dict by Parameter would be lost.
"""

import re
import statistics
import warnings
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from hf_lowmem.optim.names import named_modules, named_parameters
from hf_lowmem.specs import OptimSpec

# What modules of fused experts call their number: transformers' all say `num_experts`, others' code the rest.
COUNTS_OF_EXPERTS = ("num_experts", "n_experts", "num_local_experts")

# Models that were told of a rank without effect, with what they were told: each is told once.
_told: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()


def is_experts(module: nn.Module, p: torch.Tensor) -> bool:
    """Whether a parameter of a module is a batch of matrices, one for each expert, and not any other three dimensions.

    The module must say so: it has the number of its experts, and that is the parameter's first dimension. Position
    embeddings, query tokens, convolutions (weight-normed ones too) and heads split off a projection have no such
    number. A module of one's own says it by an attribute `num_experts`.
    """
    if p.ndim != 3 or min(p.shape) < 2 or isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Bilinear):
        return False
    return any(getattr(module, count, None) == p.shape[0] for count in COUNTS_OF_EXPERTS)


def linear_weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module name, parameter name, weight) of nn.Linear, transformers' Conv1D and fused 3-D experts.

    Names are without wrappers. The output head and anything tied to an embedding are left out, of every adapter: their
    rows are tokens, most of which have no gradient in a step, and the family's authors leave them to Adam.
    """
    for _, name, own, p in _linear(model):
        yield name, f"{name}.{own}".lstrip("."), p


def _linear(model: nn.Module) -> Iterator[tuple[str, str, str, nn.Parameter]]:
    """(path, name, parameter's own name, weight) of what `linear_weights` yields."""
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for module in model.modules():  # a PEFT or DDP wrapper keeps the method on the model inside
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module):
            lookups |= {id(weight) for weight in head_weights(head)}
    for path, name, module in named_modules(model):
        conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
        for own, p in module.named_parameters(recurse=False):
            linear = (isinstance(module, nn.Linear) or conv1d) and own == "weight" and p.ndim == 2
            if (linear or is_experts(module, p)) and id(p) not in lookups:
                yield path, name, own, p


def head_weights(head: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of an output head: its own, and the copies that PEFT keeps of it for each adapter, active or not."""
    weight = dict(head.named_parameters(recurse=False)).get("weight")
    if weight is not None:
        yield weight
    inside = [getattr(head, name, None) for name in ("original_module", "base_layer", "token_adapter")]
    copies = getattr(head, "modules_to_save", None)
    for module in (*inside, *(copies.values() if isinstance(copies, nn.ModuleDict) else ())):
        if isinstance(module, nn.Module):
            yield from head_weights(module)


def is_target(module_name: str, targets: str | list[str] | None) -> bool:
    """Whether `optim_target_modules` names the module, as HuggingFace reads that field."""
    if targets is None:
        return True
    if isinstance(targets, str):
        return targets.replace("_", "-") == "all-linear" or re.fullmatch(targets, module_name) is not None
    return any(t in module_name or re.fullmatch(t, module_name) for t in targets)


def parameter_groups(
    model: nn.Module,
    spec: OptimSpec,
    *,
    rank: int | None,
    batches: bool = False,
    decay: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups of (name, parameter) for `LowMemOptimizer(params)`: low-rank or not × experts or not × decayed or not.

    Args:
        model: its trainable parameters are taken; a tied one once. Names are without wrappers; see optim/names.py.
        spec: for weight decay and targets.
        rank: the low-rank method's rank; `None` for a full-rank method.
        batches: whether the method has an option `experts`: fused experts are then groups of their own.
        decay: names of the parameters that decay, as the model has them. `None`: those with at least two dimensions,
            so that neither biases nor norms do.

    Raises:
        ValueError: where nothing can be trained, or where the rank or the targets that a user gave leave no weight to
            the low-rank rule.
    """
    named = [entry for entry in named_parameters(model) if entry[2].requires_grad]
    if not named:
        raise ValueError(
            f"the model ({type(model).__name__}) has no trainable parameter. Set requires_grad=True on some."
        )
    low_rank = _low_rank(model, spec, rank) if rank is not None else set[int]()
    experts: set[int] = set()
    if batches:
        experts = {id(p) for m in model.modules() for p in m.parameters(recurse=False) if is_experts(m, p)}

    groups: dict[tuple[bool, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for path, name, p in named:
        decays = p.ndim >= 2 if decay is None else path in decay or name in decay
        groups.setdefault((id(p) in low_rank, id(p) in experts, decays), []).append((name, p))
    return [
        {
            "params": members,
            "weight_decay": spec.weight_decay if decays else 0.0,
            **({} if rank is None else {"rank": rank if projected else None}),
            **({"experts": batch} if batches else {}),
        }
        for (projected, batch, decays), members in sorted(groups.items(), reverse=True)
    ]


def _low_rank(model: nn.Module, spec: OptimSpec, rank: int) -> set[int]:
    """Ids of the trainable weights that take the low-rank rule; what the rank leaves out is told."""
    targets = spec.target_modules
    chosen = [
        p
        for path, name, _, p in _linear(model)
        if p.requires_grad and (is_target(name, targets) or is_target(path, targets))
    ]
    low_rank = [p for p in chosen if rank < min(p.shape[-2:])]
    if targets is not None and not chosen:
        raise ValueError(
            f"{spec.label('target_modules')}={targets!r} matches no trainable linear layer of "
            f"{type(model).__name__}. Leave it unset for every linear one, or see model.named_modules()."
        )
    sides = [min(p.shape[-2:]) for p in chosen]
    if spec.rank is not None and not low_rank:
        raise ValueError(
            f"{spec.label('rank')}={rank} has no effect: no trainable linear weight has a smaller side above it "
            f"(the largest is {max(sides, default=0)}). Lower the rank, or choose 'adamw'."
        )
    if len(low_rank) < len(chosen) or not chosen:
        left = [p for p in chosen if rank >= min(p.shape[-2:])]
        _tell(model, _without_effect(spec, rank, sides, left))
    return {id(p) for p in low_rank}


def _without_effect(spec: OptimSpec, rank: int, sides: list[int], left: list[nn.Parameter]) -> str:
    """Warning that a rank leaves weights to plain Adam: how many, and which rank would not."""
    given = "" if spec.rank is not None else "its default "
    asked = f"{spec.label('name')}={spec.name!r} with {given}rank={rank}"
    if not sides:
        return f"{asked}: the model has no trainable linear weight, so all take plain Adam. Choose 'adamw' instead."
    count = f"all {len(sides)}" if len(left) == len(sides) else f"{len(left)} of {len(sides)}"
    saved = ", and nothing is saved" if len(left) == len(sides) else ""
    usual = statistics.median_low(sides)
    remedy = "Choose 'adamw' instead"
    if usual > 1:
        remedy = (
            f"Set {spec.label('rank')}={max(1, usual // 4)} (a quarter of {usual}, their median smaller side) or "
            f"another below {usual}"
        )
    return (
        f"{asked}: {count} linear weights ({sum(p.numel() for p in left):,} parameters) have no smaller side above it "
        f"and take plain Adam with whole moments{saved}. {remedy}."
    )


def _tell(model: nn.Module, message: str) -> None:
    told = _told.setdefault(model, set())
    if message not in told:
        told.add(message)
        warnings.warn(message, stacklevel=6)

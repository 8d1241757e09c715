"""Parameter groups of a model: with names, split by weight decay, low-rank targets and experts apart.

A group says everything about its parameters in plain values, because FSDP2 replaces the entries of
`group["params"]` after the optimizer was made: knowledge kept in a dict by Parameter would be lost.
"""

import re
import statistics
import warnings
import weakref
from collections.abc import Collection, Iterator

from torch import nn

from hf_lowmem.optim import roles
from hf_lowmem.optim.names import named_parameters
from hf_lowmem.optim.roles import linear_parameters
from hf_lowmem.optim.state import Group
from hf_lowmem.specs import OptimSpec

# Models that were told of a rank without effect, with what they were told: each is told once.
_told: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()


def linear_weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module name, parameter name, weight) of nn.Linear, transformers' Conv1D and fused 3-D experts.

    Names are without wrappers. The output head and anything tied to an embedding are left out, of every adapter: their
    rows are tokens, most of which have no gradient in a step, and the family's authors leave them to Adam.
    """
    for _, name, own, _, p in linear_parameters(model):
        yield name, f"{name}.{own}".lstrip("."), p


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
    facts: Collection[str] = (),
    decay: Collection[str] | None = None,
) -> list[Group]:
    """Groups of (name, parameter) for `LowMemOptimizer(params)`: low-rank or not × facts × decayed or not.

    Args:
        model: its trainable parameters are taken; a tied one once. Names are without wrappers; see optim/names.py.
        spec: for weight decay and targets.
        rank: the low-rank method's rank; `None` for a full-rank method.
        facts: names of those that the method needs (optim/roles.py): parameters that differ in one are groups apart.
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
    said = roles.facts_of(model) if facts else {}
    groups: dict[tuple[bool, str, bool], list[tuple[str, nn.Parameter]]] = {}
    own: dict[tuple[bool, str, bool], Group] = {}
    for path, name, p in named:
        decays = p.ndim >= 2 if decay is None else path in decay or name in decay
        apart = {fact: said[id(p)][fact] for fact in facts}
        key = id(p) in low_rank, repr(apart), decays
        groups.setdefault(key, []).append((name, p))
        own[key] = apart
    return [
        {
            "params": groups[key],
            "weight_decay": spec.weight_decay if key[-1] else 0.0,
            **({} if rank is None else {"rank": rank if key[0] else None}),
            **own[key],
        }
        for key in sorted(groups, reverse=True)
    ]


def _low_rank(model: nn.Module, spec: OptimSpec, rank: int) -> set[int]:
    """Ids of the trainable weights that take the low-rank rule; what the rank leaves out is told."""
    targets = spec.target_modules
    chosen = [
        p
        for path, name, _, _, p in linear_parameters(model)
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

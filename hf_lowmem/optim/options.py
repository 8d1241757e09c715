"""Options of a parameter group: the user's, a method's defaults for the rest, and no option without effect."""

import math
from typing import Any

from torch import Tensor

from hf_lowmem.codecs import codec_pair
from hf_lowmem.optim import roles
from hf_lowmem.optim.method import Method, methods_with
from hf_lowmem.optim.state import Group
from hf_lowmem.specs import LABELS, OptimSpec, check_choice

__all__ = ["plain", "resolve", "with_rate"]

ARGUMENTS = {field: argument for argument, field in LABELS.items()}
LEAST_EPS = 1e-10  # with a coded state, whose root is of LEAST_SQUARE of adamw/reference.py at least


def resolve(cls: type[Method], spec: OptimSpec) -> Group:
    """See `LowMemOptimizer.resolve`."""
    codecs = codec_pair(spec.state, label=spec.label("state"))
    names = [c.name for c in codecs]
    group: Group = {"method": cls.name, "lr": spec.lr}
    for option in ("betas", "eps", "rank", "update_gap", "scale", "projection", "rotate", "embeddings"):
        value = getattr(spec, option)
        if option in cls.DEFAULTS:
            group[option] = cls.DEFAULTS[option] if value is None else value
        elif value is not None:
            raise ValueError(
                f"{spec.label(option)}={value!r} has no effect with {spec.label('name')}={cls.name!r}. "
                f"Leave it unset, or choose a method that uses it: {', '.join(methods_with(option))}."
            )
    if "betas" in group:
        group["betas"] = (group["betas"][0], group["betas"][1])
    if group.get("eps", LEAST_EPS) < LEAST_EPS and set(names) != {"fp32"}:
        raise ValueError(
            f"{spec.label('eps')}={group['eps']!r} with {spec.label('state')}={spec.state!r}: second moments "
            f"in few bits say nothing of gradients that small. Take {LEAST_EPS:g} or more, or state 'fp32'."
        )
    if "projection" in group:
        check_choice(
            f"{spec.label('name')}={cls.name!r} with {spec.label('projection')}", group["projection"], cls.PROJECTIONS
        )
    if group.get("rotate") and group["projection"] == "random":
        raise ValueError(
            f"{spec.label('rotate')}=True has no effect with {spec.label('projection')}='random': two random bases "
            "have nothing in common, so there is nothing to rotate. Leave it unset, or choose 'subspace'."
        )
    checks = {**cls.CHECKS, **{fact: roles.CHECKS[fact] for fact in cls.FACTS}}
    for option, value in spec.options.items():
        if option not in checks:
            others, mine = methods_with(option), ARGUMENTS.get(option)
            remedy = f"It belongs to: {', '.join(others)}" if others else f"It has: {', '.join(cls.CHECKS) or 'none'}"
            remedy += ". Leave it out" + (f", or choose one of those as {spec.label('name')}" if others else "")
            if mine is not None and not spec.labels:
                remedy = f"That is the field of training arguments; here it is {mine}={value!r}"
            raise ValueError(
                f"{spec.label('options')}: {option}={value!r} is not an option of "
                f"{spec.label('name')}={cls.name!r} alone. {remedy}."
            )
        checks[option](f"{spec.label('options')}: {option}" if spec.labels else option, value)
    defaults = {**cls.DEFAULTS, **roles.DEFAULTS}
    group |= {option: spec.options.get(option, defaults[option]) for option in checks}
    for option in ("basis", "lazy_overlap"):
        if group.get(option) is not None and group["projection"] == "random":
            raise ValueError(
                f"{spec.label('options')}: {option}={group[option]!r} has no effect with "
                f"{spec.label('projection')}='random', which stores no basis. Leave it unset, or choose 'subspace'."
            )
    state = names[0] if names[0] == names[1] else ",".join(names)
    return group | {"state": state} | {k: getattr(spec, k) for k in ("weight_decay", "weights", "seed")}


def plain(lr: Any) -> Any:
    """A learning rate as a number. torch lets it be a tensor, which a schedule may change in place."""
    if not isinstance(lr, Tensor):
        return lr
    if lr.numel() != 1:
        raise ValueError(f"lr={lr!r}: Tensor lr must be 1-element. Give one rate; other groups may have their own.")
    return lr.item()


def with_rate(group: Group) -> Group:
    """A group whose learning rate is a number that can be multiplied with.

    Raises:
        ValueError: for a NaN or an Inf, which would be in every weight after one step.
    """
    lr = plain(group["lr"])
    if not math.isfinite(lr):
        raise ValueError(
            f"lr={lr!r}: a schedule or a loop has set a learning rate that is no number. No step was made."
        )
    return group | {"lr": lr} if isinstance(group["lr"], Tensor) else group

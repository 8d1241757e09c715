"""The fields of HuggingFace whose default is the method's own with an optim of ours: betas and eps.

TrainingArguments hold numbers in them, for HuggingFace's optimizers read them. So what nobody chose is filled in when
arguments are made, and filled in anew whenever `optim` is assigned, by a user, a search or `set_optimizer`.

Whether a number was chosen is remembered in two ways. The instance keeps the names of the chosen fields, which
survives pickling. And the numbers that are filled in are objects of their own: `dataclasses.replace` and
`Config(**args.to_dict())` hand these very objects on to the next instance, which knows by them that nobody chose the
number; an equal one that a user wrote is another object. JSON has no such objects: what is read from it was chosen.
"""

import logging
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments

from hf_lowmem.optim import ALL_METHODS, methods_with
from hf_lowmem.specs import check_choice
from hf_lowmem.training import section

logger = logging.getLogger(__name__)

__all__ = ["ADAM_DEFAULTS", "assigned", "open_fields", "own_defaults", "settle"]

ADAM_DEFAULTS: dict[str, float] = {
    f: TrainingArguments.__dataclass_fields__[f].default for f in ("adam_beta1", "adam_beta2", "adam_epsilon")
}
_CHOSEN = "_lowmem_chosen"


def _defaults(name: str) -> dict[str, float]:
    """Values of the fields for an optimizer where a user chose none: name of a field → its default."""
    own = ALL_METHODS[name].DEFAULTS if name in ALL_METHODS else {}
    betas = own.get("betas", (ADAM_DEFAULTS["adam_beta1"], ADAM_DEFAULTS["adam_beta2"]))
    return dict(zip(ADAM_DEFAULTS, (*betas, own.get("eps", ADAM_DEFAULTS["adam_epsilon"])), strict=True))


_HUGGINGFACE = "huggingface"
_FILLED = {
    name: {f: float.fromhex(float(value).hex()) for f, value in _defaults(name).items()}  # new objects
    for name in (_HUGGINGFACE, *ALL_METHODS)
}


def _is_filled(value: Any) -> bool:
    return value is None or any(value is number for numbers in _FILLED.values() for number in numbers.values())


def settle(args: Any) -> None:
    """Fill what nobody chose with the values of the present `optim`."""
    values = vars(args)
    if _CHOSEN not in values:
        values[_CHOSEN] = [f for f in ADAM_DEFAULTS if not _is_filled(getattr(args, f))]
    name = str(getattr(args.optim, "value", args.optim))
    filled = _FILLED.get(name, _FILLED[_HUGGINGFACE])
    values.update({f: number for f, number in filled.items() if f not in values[_CHOSEN]})


def assigned(args: Any, name: str, value: Any) -> None:
    """Follow the assignment of a field; before the first settling there is nothing to follow."""
    chosen = vars(args).get(_CHOSEN)
    if chosen is None or (name != "optim" and name not in ADAM_DEFAULTS):
        return
    if name != "optim":
        others = [f for f in chosen if f != name]
        vars(args)[_CHOSEN] = others if _is_filled(value) else [*others, name]
    settle(args)


def open_fields(args: Any) -> frozenset[str]:
    """Names of the fields of a config that have their class's default."""
    return frozenset(
        f.name
        for f in fields(args)
        if getattr(args, f.name, MISSING) == (f.default if f.default_factory is MISSING else f.default_factory())
    )


def own_defaults(option: str) -> str:
    """The defaults of an option by method, for a help text: "256 (apollo), 1 (apollo_mini)"."""
    by_value: dict[Any, list[str]] = {}
    for name in methods_with(option):
        by_value.setdefault(ALL_METHODS[name].DEFAULTS[option], []).append(name)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())


def take_section(args: Any, known: list[str], inherited: Callable[[str], Any]) -> None:
    """Fields that have their default value take what HF_LOWMEM_CONFIG says of them.

    Args:
        known: names that a section may hold.
        inherited: the default that a field would have without ours.
    """
    label = f"{section.VARIABLE} ({section.KEY})"
    if getattr(args, "_lowmem_lent", False):
        # A script that knows nothing of us may say its class's defaults: what ours leave open is open here, too.
        for name in (*ADAM_DEFAULTS, "gradient_checkpointing"):
            if getattr(args, name) == inherited(name):
                setattr(args, name, None)
    for name, value in section.from_env().items():
        check_choice(f"{label}: field", name, known)
        own = type(args).__dataclass_fields__.get(name)
        if own is None or getattr(args, name) == value:
            continue
        if getattr(args, name) != own.default:
            mine = getattr(args, name)
            if getattr(args, "_lowmem_lent", False):
                raise ValueError(
                    f"{label}: {name}={value!r}, and the script sets {name}={mine!r}. Take one of the two out."
                )
            logger.warning("%s: %s=%r gives way to %r, which was set here", label, name, value, mine)
            continue
        setattr(args, name, value)

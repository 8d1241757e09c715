"""What a parameter group holds: the user's options, a method's defaults for the rest, and no option without effect."""

from typing import TYPE_CHECKING, Any

from hf_lowmem.codecs import codec_pair
from hf_lowmem.specs import OptimSpec, check_choice

if TYPE_CHECKING:
    from hf_lowmem.optim.base import LowMemOptimizer

__all__ = ["resolve"]


def resolve(cls: "type[LowMemOptimizer]", spec: OptimSpec) -> dict[str, Any]:
    """See `LowMemOptimizer.resolve`."""
    from hf_lowmem.optim import methods_with  # the table is built from classes that need this file

    codecs = codec_pair(spec.state, label=spec.label("state"))
    names = [c.name for c in codecs]
    group: dict[str, Any] = {"method": cls.name, "lr": spec.lr}
    for option in ("betas", "eps", "rank", "update_gap", "scale", "projection", "rotate"):
        value = getattr(spec, option)
        if option in cls.DEFAULTS:
            group[option] = cls.DEFAULTS[option] if value is None else value
        elif value is not None:
            raise ValueError(
                f"{spec.label(option)}={value!r} has no effect with {spec.label('name')}={cls.name!r}. "
                f"Leave it unset, or choose a method that uses it: {', '.join(methods_with(option))}."
            )
    group["betas"] = (group["betas"][0], group["betas"][1])
    if "projection" in group:
        check_choice(
            f"{spec.label('name')}={cls.name!r} with {spec.label('projection')}", group["projection"], cls.PROJECTIONS
        )
    for option, value in spec.options.items():
        if option not in cls.CHECKS:
            others = methods_with(option)
            remedy = f"It belongs to: {', '.join(others)}" if others else f"It has: {', '.join(cls.CHECKS) or 'none'}"
            raise ValueError(
                f"{spec.label('options')}: {option}={value!r} is not an option of "
                f"{spec.label('name')}={cls.name!r} alone. {remedy}."
            )
        cls.CHECKS[option](spec.label(option), value)
    group |= {option: spec.options.get(option, cls.DEFAULTS[option]) for option in cls.CHECKS}
    state = names[0] if names[0] == names[1] else ",".join(names)
    return group | {"state": state} | {k: getattr(spec, k) for k in ("weight_decay", "weights", "seed")}

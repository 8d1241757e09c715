"""Products in 8 bits on a model's linears, for as long as a training lasts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_lowmem.matmul.frozen import agree, keep_codes, why_whole
from hf_lowmem.matmul.linear import Linear8, why_not
from hf_lowmem.matmul.products import RECIPES
from hf_lowmem.matmul.spec import CAPABILITY, LEAST, MatmulSpec
from hf_lowmem.memory import human_bytes
from hf_lowmem.patching import forwards_of

__all__ = ["OwnedProducts", "ProductReport", "code_frozen", "products_of"]


@dataclass
class ProductReport:
    """Linears that are multiplied in 8 bits, and those that are not.

    Attributes:
        recipe: of `lowmem_matmul`.
        least: tokens of a call below which the plain product runs.
        handled: names of the linears.
        left: linears whose products stay as they are: name → why.
        share: of all weights in the linears that were looked at, those that are handled.
        frozen: frozen weights among the handled: name → why they are kept, None where their codes alone are.
        frozen_bytes: of those that are kept as codes alone: as weights, and as codes.
    """

    recipe: str
    least: int
    handled: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    share: float = 0.0
    frozen: dict[str, str | None] = field(default_factory=dict)
    frozen_bytes: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        lines = [
            f"{self.recipe}: {len(self.handled)} linears, {self.share:.1%} of the weights in layers' linears; calls "
            f"with fewer than {self.least} tokens are left out"
        ]
        if coded := sum(why is None for why in self.frozen.values()):
            before, after = map(human_bytes, self.frozen_bytes)
            lines.append(f"codes alone: {coded} frozen weights, {after} in the place of {before}")
        kept = {name: why for name, why in self.frozen.items() if why is not None}
        return "\n".join([*lines, *by_reason("weights and codes", kept), *by_reason("left", self.left)])


def by_reason(what: str, found: Mapping[str, str]) -> list[str]:
    """A line for each reason among name → reason, with the first name that has it."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.items():
        reasons.setdefault(why, []).append(name)
    more = {why: f" and {len(names) - 1} more" if len(names) > 1 else "" for why, names in reasons.items()}
    return [f"{what}: {names[0]}{more[why]}: {why}" for why, names in reasons.items()]


def products_of(
    linears: Mapping[str, nn.Module], spec: MatmulSpec, model: nn.Module | None = None, *, whole: str | None = None
) -> ProductReport:
    """Report of a spec on linears. The model stays as it is.

    Args:
        linears: of decoder layers, by name.
        spec: how they multiply.
        model: that they are of; without one nothing is looked for among its frozen weights.
        whole: why its frozen weights are kept, all of them.

    Raises:
        ValueError: where it can do nothing, or the device has no such products.
    """
    least = LEAST if spec.least is None else spec.least
    report, said = ProductReport(spec.recipe, least), f"lowmem_matmul={spec.recipe!r}"
    sizes: dict[str, int] = {}
    for name, module in linears.items():
        why = why_not(module, spec.recipe, least)
        sizes[name] = math.prod(getattr(module, f, 0) for f in ("in_features", "out_features"))
        if why is None:
            _check_device(module, said, spec.recipe)
            report.handled.append(name)
        else:
            report.left[name] = why
    if not report.handled:
        name, why = next(iter(report.left.items()), ("", "no linear inside of attention or an MLP is recognised"))
        remedy = "Set lowmem_matmul_least=0 to multiply them all the same, or leave" if "below" in why else "Leave"
        raise ValueError(
            f"{said} has no effect on this model: {f'{name}: ' if name else ''}{why}. {remedy} lowmem_matmul unset."
        )
    report.share = sum(sizes[name] for name in report.handled) / sum(sizes.values())
    if model is not None:
        handled = {name: linears[name] for name in report.handled}
        found = why_whole(model, handled, spec.recipe)
        report.frozen = {name: why or whole for name, why in found.items()}
        alone = [handled[name].get_parameter("weight") for name, why in report.frozen.items() if why is None]
        rows = [1 if RECIPES[spec.recipe].whole else p.shape[0] for p in alone]
        report.frozen_bytes = (
            sum(p.numel() * p.element_size() for p in alone),
            sum(p.numel() + 4 * count + p.element_size() for p, count in zip(alone, rows, strict=True)),
        )
    return report


def _check_device(module: nn.Module, said: str, recipe: str) -> None:
    device = next(module.parameters()).device
    if device.type != "cuda" or torch._C._len_torch_dispatch_stack() or not torch.cuda.is_available():
        return  # a CPU has the reference, and a simulated device no capability
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and found < CAPABILITY[recipe]:
        other = next((name for name, least in CAPABILITY.items() if found >= least), None)
        remedy = f"Set lowmem_matmul={other!r}, or leave it unset" if other else "Leave it unset"
        raise ValueError(
            f"{said}: {torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and such "
            f"products need {CAPABILITY[recipe][0]}.{CAPABILITY[recipe][1]}. {remedy}."
        )


def code_frozen(
    linears: Mapping[str, nn.Module], spec: MatmulSpec, model: nn.Module, *, whole: str | None = None
) -> ProductReport:
    """Keep codes alone of the frozen weights that a spec multiplies; see `products_of`. Again is nothing."""
    report = products_of(linears, spec, model, whole=whole)
    if alone := {name: linears[name] for name, why in report.frozen.items() if why is None}:
        keep_codes(model, alone, spec.recipe)
    return report


class OwnedProducts:
    """Products that can be taken off again as a whole.

    Args:
        linears: of decoder layers, by name; changed in place.
        spec: how they multiply.
        model, whole: see `products_of`. Of the model's frozen weights codes alone are kept, from here on.

    Products that another owner has left on a linear are taken off first.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        spec: MatmulSpec,
        model: nn.Module | None = None,
        *,
        whole: str | None = None,
    ) -> None:
        for module in linears.values():
            for patch in list(forwards_of(module)):
                if isinstance(patch, Linear8):
                    patch.take_away()
        if model is None:
            self.report = products_of(linears, spec)
        else:
            self.report = code_frozen(linears, spec, model, whole=whole)
            agree(linears)
        self._ours = []
        for name in self.report.handled:
            module = linears[name]
            assert isinstance(module, nn.Linear)
            self._ours.append(Linear8(module, spec.recipe, self.report.least))
            self._ours[-1].put()

    def take_off(self) -> None:
        """Leave the model as it was found, but for frozen weights of which codes are kept: these stay so. Does nothing
        the second time."""
        for patch in self._ours:
            patch.take_away()
        self._ours = []

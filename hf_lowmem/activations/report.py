"""The outcome of a conversion, and what it is worth: handled or left alone per layer, bytes per token counted."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_lowmem.activations.blocks import put_back, take_out
from hf_lowmem.activations.streaming.masks import MaskMaker
from hf_lowmem.memory import measure_saved

__all__ = ["LayerReport", "Measured", "Report", "measure"]


@dataclass
class LayerReport:
    """One layer: its tier (None: as HuggingFace made it), what is handled (kind → count), what is not (name → why)."""

    name: str
    tier: str | None
    handled: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def cells(self) -> tuple[str, str, str]:
        """Tier, what was handled and what was left alone, for a row of the table."""
        handled = ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in self.handled.items())
        left = "; ".join(f"{name}: {why}" if name else why for name, why in self.left.items())
        return self.tier or "-", handled or "-", left or "-"


@dataclass
class Report:
    """The outcome of `convert`. `str(report)` is a table with one row for each run of equal layers.

    tiers:   as asked for
    others:  lists of layers that were not converted: name → why
    notes:   what else keeps much
    layers:  one LayerReport a layer
    """

    tiers: str
    others: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("layers", "tier", "handled", "left alone")]
        for cells, group in itertools.groupby(self.layers, LayerReport.cells):
            names = [layer.name for layer in group]
            last = "" if len(names) == 1 else f"-{names[-1].rpartition('.')[2]}"
            rows.append((names[0] + last, *cells))
        rows += [(name, "-", "-", why) for name, why in self.others.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])) for row in rows]
        return "\n".join([line.rstrip() for line in lines] + self.notes)


@dataclass
class Measured:
    """Bytes kept for backward when a forward pass ends, without and with the conversion.

    before, after: of the whole model; layers: name → (before, after); tokens: of the batch
    """

    tokens: int
    before: int
    after: int
    layers: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        lines = [("bytes per token", "before", "after", "ratio")]
        for name, (before, after) in [*self.layers.items(), ("the whole model", (self.before, self.after))]:
            lines.append((name, f"{before / self.tokens:,.0f}", f"{after / self.tokens:,.0f}", f"{after / before:.3f}"))
        w, *ws = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join("  ".join((a.ljust(w), *map(str.rjust, rest, ws))) for a, *rest in lines)


def measure(model: nn.Module, step: Callable[[], Any], tokens: int) -> Measured:
    """Count what a forward pass of a converted model keeps, beside the same pass of the plain model.

        measured = measure(model, lambda: model(**batch).loss, batch["input_ids"].numel())
        print(measured)

    step:    runs the forward pass in training mode and returns what holds its graph
    tokens:  of that pass

    Counted by unique storages (hf_lowmem.memory.measure_saved). Two forward passes, no backward; random numbers are
    drawn from a fork of the generators.

    Raises ValueError if `tokens` is not positive or the model is in eval mode, in which nothing is compressed.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: expected the number of tokens of the step, at least 1.")
    if not model.training:
        raise ValueError("model is in eval mode, in which it keeps what a plain model keeps: call model.train() first.")
    found = take_out(model)
    try:
        before = _count(model, step)
    finally:
        put_back(found)
    after = _count(model, step)
    # Who makes masks for layers is no layer.
    converted = {id(patch.module) for patch in found if not isinstance(patch, MaskMaker)}
    names = [name for name, module in model.named_modules() if id(module) in converted]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    layers = {name: (_inside(before, name), _inside(after, name)) for name in outer}
    return Measured(tokens, sum(before.values()), sum(after.values()), layers)


def _count(model: nn.Module, step: Callable[[], Any]) -> dict[str, int]:
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), measure_saved(model) as saved:
        graph = step()
        found = saved.by_module_now
    del graph
    return found


def _inside(by_module: dict[str, int], name: str) -> int:
    return sum(n for module, n in by_module.items() if module == name or module.startswith(f"{name}."))
